"""Write the trained model as a Hugging Face folder: weights one tensor at a time, everything else byte for byte."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint import replace_folder
from trainer.errors import RunError
from trainer.models.hf_weights import INDEX_FILE, SINGLE_FILE, hf_name, weight_files, write_safetensors

MAX_FILE_BYTES = 5_000_000_000
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Files of the starting model that go along; its weights and their index do not."""


def export(named_tensors: Iterable[tuple[str, Tensor]], *, source: str | Path, folder: Path) -> None:
    """Write `folder`, whole or not at all: the weights in the dtype `source` stores them in, its config and tokenizer.

    named_tensors: decoder names with float32 (or bf16) tensors. Raises RunError when the disk refuses.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    dtype = stored_dtype(source)
    shards = _shards([(hf_name(name), tensor) for name, tensor in named_tensors], dtype)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for pattern in COPIED:
            for path in Path(source).glob(pattern):
                if path.name != INDEX_FILE:
                    shutil.copyfile(path, temporary / path.name)
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(temporary / name, shard, dtype=dtype)
            weight_map |= {tensor_name: name for tensor_name, _ in shard}
        if len(shards) > 1:
            total = sum(tensor.numel() for shard in shards for _, tensor in shard) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
        replace_folder(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            folder, f"the export cannot be written ({error.strerror or error}); free space and start the run again"
        ) from None


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The dtype of a folder's first weight matrix, which an export of that model keeps."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                if len(file.get_slice(name).get_shape()) == 2:
                    return file.get_slice(name)[:1].dtype
    return torch.float32


def _shards(tensors: list[tuple[str, Tensor]], dtype: torch.dtype) -> list[list[tuple[str, Tensor]]]:
    """Tensors in order, cut into files of at most MAX_FILE_BYTES (a larger tensor stands alone)."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in tensors:
        own = tensor.numel() * dtype.itemsize
        if shards[-1] and size + own > MAX_FILE_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += own
    return shards
