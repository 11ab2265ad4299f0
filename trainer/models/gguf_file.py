"""Opening a GGUF: its metadata and its tensors, mapped and not read.

A GGUF (versions 2 and 3, little endian; ggml's `docs/gguf.md`) is a header, key-value pairs, a table of tensors, and
their data at a multiple of the alignment. The `gguf` package reads it too, but spends 20 us on each string: ten seconds
for the vocabulary of a Qwen, at each start of a run on quantised weights.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gguf
import numpy as np

from trainer.errors import ModelError

T = TypeVar("T")
MAX_DIMENSIONS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's number of a type -> its letter in `struct`."""
STRING, ARRAY = 8, 9


class Tensor(NamedTuple):
    """A tensor as it is stored. shape: slowest dimension first. data: uint8 (*shape[:-1], bytes a row), a view."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray


class Metadata:
    """The key-value part of a GGUF, read with checked types. `architecture` is the prefix of the model's own keys."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self._values = values
        self.architecture = self.need("general.architecture", str)

    def need(self, key: str, kind: type[T]) -> T:
        """The value of `key`; raises ModelError if it is absent or not a `kind` (an int passes for a float)."""
        if key not in self._values:
            raise ModelError(self.path, f"the GGUF has no key '{key}'; convert the model again with llama.cpp")
        value: Any = self._values[key]
        if kind is float and isinstance(value, int):
            value = float(value)
        if kind is float and isinstance(value, float):
            # 1e-5 is stored as float32: the shortest text that reads back as that float32 is what its author wrote
            value = float(str(np.float32(value)))
        if not isinstance(value, kind):
            raise ModelError(self.path, f"key '{key}' is a {type(value).__name__}, expected {kind.__name__}")
        return value

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`, or None if the file has no such key."""
        return self.need(key, kind) if key in self._values else None

    def own(self, suffix: str, kind: type[T]) -> T | None:
        """The value of the model's own key, `<architecture>.<suffix>`, or None."""
        return self.get(f"{self.architecture}.{suffix}", kind)

    def own_suffixes(self) -> list[str]:
        """What stands behind `<architecture>.` in all keys that begin so."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self._values if key.startswith(prefix)]


def open_gguf(path: Path) -> tuple[Metadata, dict[str, Tensor]]:
    """Map the file and read its tables; raises ModelError for anything that is not a whole GGUF."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise ModelError(path, "is not a GGUF file (its first bytes are not 'GGUF')")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(path, f"cannot be read: {error.strerror or error}") from error
    try:
        values, tensors = _Reader(mapped).read()
    # Where the file was cut decides what goes wrong.
    except (struct.error, ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(path, f"is a truncated or damaged GGUF ({reason}); download it again") from error
    return Metadata(path, values), tensors


class _Reader:
    """Reads on from `place`. Raises struct.error, ValueError and others where the bytes make no sense."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 4

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format; 2 and 3 in little endian are known")
        num_tensors, num_values = self.number("Q"), self.number("Q")
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.string()
            if key in values:
                raise ValueError(f"key '{key}' stands twice")
            values[key] = self.value(self.number("I"))
        table = [self.entry() for _ in range(num_tensors)]
        alignment = values.get("general.alignment", 32)
        start = -(-self.place // alignment) * alignment
        tensors = {name: self.tensor(name, shape, kind, start + offset) for name, shape, kind, offset in table}
        if len(tensors) != len(table):
            raise ValueError("two tensors have the same name")
        return values, tensors

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.place)
        self.place += struct.calcsize(f"<{letter}")
        return value

    def string(self) -> str:
        (size,) = struct.unpack_from("<Q", self.data, self.place)
        begin = self.place + 8
        self.place = begin + size
        if self.place > len(self.data):
            raise ValueError("it ends within a text")
        return self.data[begin : self.place].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in (STRING, ARRAY):
            return [self.value(inner) for _ in range(count)]
        letter = SCALARS[inner]
        found = np.frombuffer(self.data, dtype=f"<{letter}" if letter != "?" else "?", count=count, offset=self.place)
        self.place += found.nbytes
        return found.tolist()

    def entry(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name, dimensions = self.string(), self.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor '{name}' has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]  # GGUF counts from the fastest
        return name, shape, gguf.GGMLQuantizationType(self.number("I")), self.number("Q")

    def tensor(self, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, place: int) -> Tensor:
        stored = gguf.quants.quant_shape_to_byte_shape(shape, kind)
        size = 1
        for length in stored:
            size *= length
        if place + size > len(self.data):
            raise ValueError(f"tensor '{name}' ends beyond the file")
        data = np.frombuffer(self.data, dtype=np.uint8, count=size, offset=place)
        return Tensor(name, shape, kind, data.reshape(stored))
