"""Save and resume a run: plain safetensors and a manifest, no pickle.

    step_N/model.safetensors       float32 master weights (the weights themselves in pure bf16), Hugging Face names
           optimizer.safetensors   exp_avg.<name>, exp_avg_sq.<name>, step.<name>
           manifest.json           written last: the commit mark; step, digests, config, choices, every file's sha256

Written to `step_N.tmp`, then renamed. Tensors are streamed one at a time, so a save needs no second copy of weights or
optimizer. torch's HuggingFaceStorageWriter makes the same kind of file but builds each file in memory first;
HuggingFaceStorageReader reads these (tests/test_checkpoint.py). There is no state of random numbers to keep, on a CPU
or a GPU: no step draws one.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_tools.disk import sync
from data_tools.file_digests import hash_file
from trainer.errors import CheckpointError, RunError
from trainer.models.hf_weights import hf_name, write_safetensors
from trainer.optim import AdamW

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
    format: int = FORMAT
    torch: str = torch.__version__


def save(folder: Path, manifest: Manifest, named_masters: Iterable[tuple[str, Tensor]], optimizer: AdamW) -> None:
    """Write `folder` (…/step_N), whole or not at all. Raises RunError when the disk refuses; older steps stay whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    masters = [(hf_name(name), tensor) for name, tensor in named_masters]
    moments = [
        (f"{key}.{name}", optimizer.state[tensor][key])
        for name, tensor in masters
        for key in sorted(optimizer.state[tensor])
    ]
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {}
        for name, tensors in (("model.safetensors", masters), ("optimizer.safetensors", moments)):
            write_safetensors(temporary / name, tensors)
            files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": hash_file(temporary / name)}
        content = {**vars(manifest), "files": files}
        (temporary / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
        replace_folder(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        problem = f"the checkpoint cannot be written ({error.strerror or error}); earlier ones are whole"
        raise RunError(folder, f"{problem}: free space and resume") from None


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
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(file, "is missing or cut short; resume from another step")
    return manifest


@torch.no_grad()
def load(folder: Path, named_masters: Iterable[tuple[str, Tensor]], optimizer: AdamW) -> None:
    """Copy weights and optimizer state into place, one tensor at a time, after checking every file's sha256."""
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name, entry in files.items():
        if hash_file(folder / name) != entry["sha256"]:
            raise CheckpointError(folder / name, "differs from its sha256 in the manifest; resume from another step")
    masters = [(hf_name(name), tensor) for name, tensor in named_masters]
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            for name, tensor in masters:
                tensor.copy_(_matching(file.get_tensor(name), tensor, folder, name))
        with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
            for name, tensor in masters:
                keys = ("step", "exp_avg", "exp_avg_sq")
                state = {key: file.get_tensor(f"{key}.{name}").to(tensor.device) for key in keys}
                for key in ("exp_avg", "exp_avg_sq"):
                    _matching(state[key], tensor, folder, f"{key}.{name}")
                optimizer.state[tensor] = state
    except (SafetensorError, OSError) as error:
        raise CheckpointError(folder, f"does not fit this model ({error})") from None


def _matching(found: Tensor, wanted: Tensor, folder: Path, name: str) -> Tensor:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise CheckpointError(
            folder,
            f"tensor {name!r} is {tuple(found.shape)} {found.dtype}, this run has {tuple(wanted.shape)} {wanted.dtype}",
        )
    return found


def remove_old(checkpoints: Path, keep_last: int, *, step: int) -> None:
    """Delete all but the newest `keep_last` steps up to `step`, the one just written; other folders are left alone.

    Later steps, which a run that went back may find, count neither way: they may be the damaged ones it went back from.
    """
    numbers = (int(path.name[5:]) for path in checkpoints.glob("step_*") if path.name[5:].isdigit())
    steps = [checkpoints / f"step_{number}" for number in sorted(numbers) if number <= step]
    for path in steps[:-keep_last]:
        shutil.rmtree(path, ignore_errors=True)
