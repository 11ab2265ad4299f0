"""Safetensors files, one tensor in memory at a time: written in a stream, read by rows from whichever files hold them.

`safetensors.torch.save_file` and torch's own Hugging Face writer build the whole file in memory first: a second copy of
weights and optimizer. When several ranks write one checkpoint, each file holds rows of its tensors and says where they
belong under the key that torch.distributed.checkpoint uses, so that its HuggingFaceStorageReader reads them too.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_tools.disk import sync
from trainer.errors import CheckpointError
from trainer.parts import Part

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
SHARDING_KEY, OFFSETS_KEY = "DCP_SHARDING_INFO", "saved_offsets"
"""torch/distributed/checkpoint/_hf_utils.py (torch 2.13): JSON {tensor name: {"saved_offsets": [row, 0, ...]}}."""


class Entry(NamedTuple):
    """A tensor as the header of a file announces it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsWriter:
    """A new safetensors file. Use it with `with`, and give the tensors in the order of `entries`.

    metadata: text beside {"format": "pt"}, without which transformers refuses a file. digest: hash on the way.
    """

    def __init__(
        self, path: Path, entries: Sequence[Entry], *, metadata: dict[str, str] | None = None, digest: bool = False
    ) -> None:
        self.path = path
        self.entries = widest_first(entries)
        self._next = iter(self.entries)
        self._hash = hashlib.sha256() if digest else None
        header: dict[str, object] = {"__metadata__": {"format": "pt"} | (metadata or {})}
        offset = 0
        for name, dtype, shape in self.entries:
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._put(struct.pack("<Q", len(encoded)) + encoded)

    def write(self, tensor: Tensor) -> None:
        """Append the next entry's values, converted to its dtype."""
        entry = next(self._next)
        assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)} announced as {entry.shape}"
        data = tensor.detach().to(device="cpu", dtype=entry.dtype).contiguous()
        self._put(memoryview(data.view(-1).view(torch.uint8).numpy()))

    def sha256(self) -> str:
        """Of all that was written, in hex."""
        assert self._hash is not None
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; in good order its bytes are on the disk then."""
        self._file.close()
        if error is None:
            assert next(self._next, None) is None, f"{self.path}: fewer tensors than announced"
            sync(self.path)

    def _put(self, data: bytes | memoryview) -> None:
        if self._hash is not None:
            self._hash.update(data)
        self._file.write(data)


def widest_first(entries: Iterable[Entry]) -> list[Entry]:
    """The order in a file: wider dtypes first, so that every tensor starts at a multiple of its item size."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def write_safetensors(path: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write named tensors to one file. Raises OSError."""
    named = dict(tensors)
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()]
    with SafetensorsWriter(Path(path), entries) as writer:
        for entry in writer.entries:
            writer.write(named[entry.name])


def write_parts(path: Path, parts: Sequence[Part], *, sharded: bool) -> dict[str, object]:
    """Write this rank's rows of tensors to one file; its size and sha256, as a manifest has them. Raises OSError.

    sharded: other files hold other rows, so this one says which are here.
    """
    named = {part.name: part for part in parts}
    entries = [Entry(part.name, part.tensor.dtype, tuple(part.tensor.shape)) for part in parts]
    offsets = {part.name: {OFFSETS_KEY: [part.start] + [0] * (len(part.shape) - 1)} for part in parts if part.shape}
    offsets |= {part.name: {OFFSETS_KEY: []} for part in parts if not part.shape}
    metadata = {SHARDING_KEY: json.dumps(offsets), "DCP_VERSION": "1.0"} if sharded else None
    with SafetensorsWriter(path, entries, metadata=metadata, digest=True) as writer:
        for entry in writer.entries:
            writer.write(named[entry.name].tensor)
    return {"bytes": path.stat().st_size, "sha256": writer.sha256()}


class _Rows(NamedTuple):
    """Rows [start, start + shape[0]) of a tensor, in an open file."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Any


class RowReader:
    """The tensors that several files hold between them. Use it with `with`.

    folder: named in errors. Raises CheckpointError for a file that is no safetensors file.
    """

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._stored: dict[str, list[_Rows]] = {}
        for path in files:
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
                self._add(file)
            except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                self._open.close()
                raise CheckpointError(path, f"is not a whole safetensors file ({error!r})") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _add(self, file: Any) -> None:
        offsets = json.loads((file.metadata() or {}).get(SHARDING_KEY, "{}"))
        for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            header = file.get_slice(name)
            start = sum(offsets[name][OFFSETS_KEY][:1]) if name in offsets else 0
            rows = _Rows(start, tuple(header.get_shape()), DTYPES.get(header.get_dtype()), file)
            self._stored.setdefault(name, []).append(rows)

    def read(self, part: Part) -> None:
        """Copy the part's rows into its tensor. Raises CheckpointError unless the files hold each row of the whole
        tensor once, in the shape and dtype that `part` has."""
        name, own = part.name, part.tensor
        stored = sorted(self._stored.get(name, ()), key=lambda rows: rows.start)
        if not stored:
            raise CheckpointError(self.folder, f"does not fit this model (no tensor {name!r} in it)")
        last = stored[-1]
        found = (last.start + last.shape[0], *last.shape[1:]) if part.shape and last.shape else last.shape
        if found != part.shape or any((rows.dtype, rows.shape[1:]) != (own.dtype, part.shape[1:]) for rows in stored):
            dtype = next((rows.dtype for rows in stored if rows.dtype != own.dtype), own.dtype)
            wanted = f"{part.shape} {own.dtype}"
            raise CheckpointError(self.folder, f"tensor {name!r} is {found} {dtype}, this run has {wanted}")
        if not part.shape:
            own.copy_(last.file.get_tensor(name))
            return
        next_row = 0
        for rows in stored:
            if rows.start != next_row:
                problem = f"rows {min(next_row, rows.start)} to {max(next_row, rows.start)} of tensor {name!r}"
                missing = "are missing" if rows.start > next_row else "are in it twice"
                raise CheckpointError(self.folder, f"{problem} {missing}; resume from another step")
            next_row += rows.shape[0]
            begin, end = max(part.start, rows.start), min(part.start + len(own), next_row)
            if begin < end:
                piece = rows.file.get_slice(name)[begin - rows.start : end - rows.start]
                own[begin - part.start : end - part.start].copy_(piece)
