"""Write the trained model as a Hugging Face folder: weights one tensor at a time, everything else byte for byte.

Every rank takes part. The rows of a sharded tensor meet on rank 0, are written and are gone before the next tensor, so
no rank ever holds the whole model.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import dist
from trainer.checkpoint import make_empty, refusal, replace_folder
from trainer.errors import ModelError, RunError
from trainer.models.hf_weights import INDEX_FILE, REWARD_HEAD, SINGLE_FILE, hf_name, weight_files
from trainer.parts import Part, parts_of
from trainer.prm import TABLE
from trainer.tensor_files import DTYPES, Entry, SafetensorsWriter, widest_first

MAX_FILE_BYTES = 5_000_000_000
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Files of the starting model that go along; its weights and their index do not."""


def export(
    named_tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    folder: Path,
    table: dict[str, Any] | None = None,
) -> None:
    """Write `folder`, whole or not at all: each weight in the dtype `source` stores it in, its config and tokenizer.

    named_tensors: decoder names with float32 (or bf16) tensors, on every rank, sharded or not. table: what config.json
    says of the reward head among them (trainer.prm). Raises RunError on every rank when the disk refuses, ModelError
    where `planned_entries` does.
    """
    parts = {part.name: part for part in parts_of((hf_name(name), tensor) for name, tensor in named_tensors)}
    entries = planned_entries(parts.values(), source)
    tensors = whole_tensors(parts, entries)
    problem = None
    if dist.is_main():
        temporary = folder.with_name(folder.name + ".tmp")
        problem = refusal(lambda: write_model(temporary, folder, Path(source), entries, tensors, table))
        if problem is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    for _ in tensors:  # what the others send: all of it on these ranks, the rest of it where the disk refused
        pass
    problem = dist.broadcast_object(problem)
    if problem is not None:
        raise RunError(folder, f"the export cannot be written ({problem}); free space and start the run again")


def planned_entries(parts: Iterable[Part], source: str | Path) -> list[Entry]:
    """The tensors that an export will hold, in the order of its files, with the dtypes in `source`; a reward head in
    float32, whether `source` has one or not.

    Called before training, too: raises ModelError unless names and shapes are those of the folder the model came from.
    """
    stored, entries = {name: header[:2] for name, header in headers(source).items()}, []
    for part in parts:
        if part.name.startswith(REWARD_HEAD):
            entries.append(Entry(part.name, torch.float32, part.shape))
            continue
        if part.name not in stored:
            raise ModelError(source, f"has no tensor {part.name!r}, which this model would export; use matching files")
        shape, dtype = stored.pop(part.name)
        if shape != part.shape or dtype is None or not dtype.is_floating_point:
            problem = f"tensor {part.name!r} is {shape} {dtype}, this model would export {part.shape}"
            raise ModelError(source, f"{problem}; use matching files")
        entries.append(Entry(part.name, dtype, shape))
    # a tied head stored twice, a constant that old exports carry, a reward head that the trained weights have left
    known = ("lm_head.weight", REWARD_HEAD)
    left = [name for name in stored if not name.startswith(known) and not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise ModelError(source, f"tensor {left[0]!r} would be missing from the export; use matching files")
    return widest_first(entries)


def headers(folder: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype | None, Path]]:
    """Shape, dtype (None: one we do not write) and file of every tensor of a folder; reads none. Raises ModelError."""
    found = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    header = file.get_slice(name)
                    found[name] = (tuple(header.get_shape()), DTYPES.get(header.get_dtype()), path)
        except (SafetensorError, OSError) as error:
            raise ModelError(path, f"is not a whole safetensors file ({error}); copy it again") from None
    return found


def whole_tensors(parts: dict[str, Part], entries: list[Entry]) -> Iterator[Tensor | None]:
    """Each entry's tensor in CPU memory on rank 0, None on the others; every rank must go through to the end."""
    held = dist.gather_objects({name: (part.start, len(part.tensor)) for name, part in parts.items()})
    for name, dtype, shape in entries:
        own = parts[name].tensor.to(device="cpu", dtype=dtype)
        yield dist.gather_rows(own, shape, [ranges[name] for ranges in held])


def write_model(
    temporary: Path,
    folder: Path,
    source: Path,
    entries: list[Entry],
    tensors: Iterator[Tensor | None],
    table: dict[str, Any] | None = None,
) -> None:
    """Rank 0's part of an export: `tensors` in the order of `entries`, the other files of `source`. Raises OSError."""
    make_empty(temporary)
    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.name != INDEX_FILE:
                shutil.copyfile(path, temporary / path.name)
    _say_of_head(temporary / "config.json", table)
    weight_map = {}
    files = _cut(entries)
    for number, own in enumerate(files, start=1):
        name = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with SafetensorsWriter(temporary / name, own) as writer:
            for entry in own:
                writer.write(next(tensors))
                weight_map[entry.name] = name
    if len(files) > 1:
        total = sum(_bytes(entry) for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (temporary / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    replace_folder(temporary, folder)


def _say_of_head(path: Path, table: dict[str, Any] | None) -> None:
    """Put the reward head's table into config.json, or take away that of a head that is gone."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if content.get(TABLE) == table:
        return
    content.pop(TABLE, None)
    content |= {} if table is None else {TABLE: table}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cut(entries: list[Entry]) -> list[list[Entry]]:
    """Entries in order, cut into files of at most MAX_FILE_BYTES (a larger tensor stands alone)."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + _bytes(entry) > MAX_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += _bytes(entry)
    return files


def _bytes(entry: Entry) -> int:
    return torch.Size(entry.shape).numel() * entry.dtype.itemsize
