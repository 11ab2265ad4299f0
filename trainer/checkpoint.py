"""Save and resume a run: plain safetensors and a manifest, no pickle.

    step_N/model.safetensors       float32 master weights (the weights themselves in pure bf16), Hugging Face names;
                                   with adapters, those alone (`model.layers.0.self_attn.q_proj.lora_A`)
           optimizer.safetensors   exp_avg.<name>, exp_avg_sq.<name>, step.<name>
           manifest.json           written last: the commit mark; step, digests, config, choices, every file's sha256

Where n ranks each hold rows of the tensors, each writes its own model-00001-of-0000n.safetensors and
optimizer-00001-of-0000n.safetensors; whatever wrote a checkpoint, any number of ranks reads it, each its own rows.

Written to `step_N.tmp`, then renamed. Tensors are streamed one at a time, so a save needs no second copy of weights or
optimizer. torch's HuggingFaceStorageWriter makes the same kind of file but builds each file in memory first;
HuggingFaceStorageReader reads these (tests/test_checkpoint.py). There is no state of random numbers to keep, on a CPU
or a GPU: what adapters drop follows from seed, step, micro-batch and rank (lora.Dropout), nothing else is drawn.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_tools.disk import sync
from data_tools.file_digests import hash_file
from trainer import dist
from trainer.errors import CheckpointError, RunError
from trainer.models.hf_weights import hf_name
from trainer.optim import AdamW
from trainer.parts import Part, local, part_of
from trainer.tensor_files import RowReader, write_parts

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself. `step`: updates done. `config`: resolved, as TOML text."""

    step: int
    config: str
    data_digest: str
    weights_digest: str
    world_size: int
    threads: int
    choices: dict[str, object] = field(default_factory=dict)
    """Decided by measurement at the start of the run and reused on resume."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    reference_digest: str = ""
    """Of the reference model's weights; empty for objectives without one."""
    solved_steps: int = 0
    """So many steps in a row were solved at its end (trainer.health)."""
    format: int = FORMAT
    torch: str = torch.__version__


class Writers(NamedTuple):
    """Which ranks write a checkpoint: this one is number `number` of `count`, from 0; None: it writes nothing."""

    number: int | None = 0
    count: int = 1


WHOLE = Writers()
"""Rank 0 holds everything and writes it alone."""


class State(NamedTuple):
    """This rank's rows of what a checkpoint holds."""

    model: list[Part]
    optimizer: list[Part]


def state_of(named_masters: Iterable[tuple[str, Tensor]], optimizer: AdamW) -> State:
    """Masters and optimizer state as they are in memory, not copies; names as in the files.

    A sharded master's moments are this rank's rows of them, as plain tensors.
    """
    state = State([], [])
    for name, tensor in named_masters:
        part = part_of(hf_name(name), tensor)
        state.model.append(part)
        for key, value in sorted(optimizer.state[tensor].items()):
            whole = value.ndim == 0  # the number of updates, which every rank has
            own = local(value).detach()
            shape, start = ((), 0) if whole else (part.shape, part.start)
            state.optimizer.append(Part(f"{key}.{part.name}", own, shape, start))
    return state


def save(
    folder: Path, manifest: Manifest, state: State, *, writers: Writers = WHOLE, group: dist.SideGroup = None
) -> None:
    """Write `folder` (…/step_N), whole or not at all. Every rank calls it, with what it holds.

    group: where the ranks meet; a background thread must not use the main one. Raises RunError on every rank when the
    disk refuses one of them; older steps stay whole.
    """
    temporary, problem = folder, None
    if dist.is_main():
        # Rank 0 alone holds the run's lock. A rank of a dead run that still writes must not get into this run's folder:
        # where several write, its name is one that no other run knows.
        mark = f".{secrets.token_hex(4)}" if writers.count > 1 else ""
        temporary = folder.with_name(f"{folder.name}{mark}.tmp")
        problem = refusal(lambda: make_empty(temporary))
    temporary, problem = dist.broadcast_object((temporary, problem), group)
    files: dict[str, object] = {}
    if problem is None and writers.number is not None:
        problem = refusal(lambda: files.update(_write_files(temporary, state, writers)))
    everywhere = dist.gather_objects((files, problem), group)
    problem = next((text for _, text in everywhere if text is not None), None)
    if dist.is_main():
        files = {name: entry for part, _ in everywhere for name, entry in part.items()}
        problem = problem or refusal(lambda: _commit(temporary, folder, manifest, files))
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    problem = dist.broadcast_object(problem, group)
    if problem is not None:
        problem = f"the checkpoint cannot be written ({problem}); earlier ones are whole"
        raise RunError(folder, f"{problem}: free space and resume")


def refusal(act: Callable[[], object]) -> str | None:
    """Call `act`; why the disk refused it, or None."""
    try:
        act()
    except OSError as error:
        return error.strerror or str(error)
    return None


def make_empty(folder: Path) -> None:
    """An empty `folder`, whatever was there. Raises OSError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_files(folder: Path, state: State, writers: Writers) -> dict[str, object]:
    """This rank's files and their entries in the manifest."""
    files, sharded = {}, writers.count > 1
    for kind, parts in state._asdict().items():
        name, own = f"{kind}.safetensors", parts
        if sharded:
            name = f"{kind}-{writers.number + 1:05d}-of-{writers.count:05d}.safetensors"
            # what a later rank holds whole, the first one holds too
            own = [part for part in parts if writers.number == 0 or tuple(part.tensor.shape) != part.shape]
            own = [part for part in own if part.tensor.numel()]
        files[name] = write_parts(folder / name, own, sharded=sharded)
    return files


def _commit(temporary: Path, folder: Path, manifest: Manifest, files: dict[str, object]) -> None:
    """Write the manifest and give the folder its name."""
    content = {**vars(manifest), "files": files}
    content["digest"] = _digest(content)
    (temporary / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    replace_folder(temporary, folder)


def _digest(content: dict[str, object]) -> str:
    """Of a manifest itself, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename `temporary`, its files on the disk by then, to `folder`; an old `folder` steps aside first and is deleted
    once the new one stands. Raises OSError.
    """
    for path in temporary.iterdir():
        sync(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, its files' sizes checked. Raises CheckpointError."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(folder, f"has no {MANIFEST}: not a complete checkpoint; resume from another step")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        digest = raw.pop("digest", None)
        changed = digest is not None and _digest(raw) != digest
        version, files = raw.pop("format"), raw.pop("files")
        sizes = {name: entry["bytes"] for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(path, f"is not a checkpoint manifest ({error!r}); resume from another step") from None
    if version != FORMAT:
        raise CheckpointError(
            path, f"has format {version!r}, this version reads {FORMAT}; use the version that wrote it"
        )
    try:
        manifest = Manifest(**raw)
    except TypeError as error:
        raise CheckpointError(path, f"is not a checkpoint manifest ({error}); resume from another step") from None
    for name, kind, text in (("step", int, "a whole number"), ("config", str, "text"), ("choices", dict, "an object")):
        if not isinstance(getattr(manifest, name), kind):
            raise CheckpointError(path, f"{name!r} must be {text}; resume from another step")
    if changed:
        raise CheckpointError(path, "differs from its own digest; resume from another step")
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(file, "is missing or cut short; resume from another step")
    return manifest


def find_damage(folder: Path, *, rank: int = 0, world_size: int = 1) -> str | None:
    """Compare files with their sha256 in the manifest, each rank its share of them; what is wrong, or None.

    `read_manifest` has been through this folder.
    """
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name in sorted(files)[rank::world_size]:
        try:
            if hash_file(folder / name) != files[name]["sha256"]:
                return f"{name} differs from its sha256 in the manifest; resume from another step"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror}); resume from another step"
    return None


@torch.no_grad()
def load(folder: Path, named_masters: Iterable[tuple[str, Tensor]], optimizer: AdamW) -> None:
    """Copy this rank's rows of weights and optimizer state into place, one tensor at a time; every rank may have other
    rows than when they were saved. Raises CheckpointError. Digests are for `find_damage`, before this.
    """
    named = list(named_masters)
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for _, tensor in named:
        like = local(tensor)
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=like.device),
            "exp_avg": torch.empty_like(like),
            "exp_avg_sq": torch.empty_like(like),
        }
    with RowReader(folder, [folder / name for name in files]) as reader:
        for part in (part for parts in state_of(named, optimizer) for part in parts):
            reader.read(part)


def remove_old(checkpoints: Path, keep_last: int, *, step: int) -> None:
    """Delete all but the newest `keep_last` steps up to `step`, the one just written; other folders are left alone.

    Later steps, which a run that went back may find, count neither way: they may be the damaged ones it went back from.
    """
    numbers = (int(path.name[5:]) for path in checkpoints.glob("step_*") if path.name[5:].isdigit())
    steps = [checkpoints / f"step_{number}" for number in sorted(numbers) if number <= step]
    for path in steps[:-keep_last]:
        half_gone = path.with_name(f"{path.name}.tmp")  # what a kill leaves of it must not look like a checkpoint
        shutil.rmtree(half_gone, ignore_errors=True)
        with suppress(OSError):
            os.rename(path, half_gone)
            shutil.rmtree(half_gone, ignore_errors=True)
