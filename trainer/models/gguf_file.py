"""Opening a GGUF: its tables and its metadata, read with checked types.

A GGUF is a header, key-value pairs, a table of tensors and their data, mapped into memory by the `gguf` package.
"""

from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np

from trainer.errors import ModelError

T = TypeVar("T")


class Metadata:
    """The key-value part of a GGUF. `architecture` is the prefix of the model's own keys."""

    def __init__(self, path: Path, reader: gguf.GGUFReader) -> None:
        self.path = path
        self._fields = reader.fields
        self.architecture = self.need("general.architecture", str)

    def need(self, key: str, kind: type[T]) -> T:
        """The value of `key`; raises ModelError if it is absent or not a `kind` (an int passes for a float)."""
        if key not in self._fields:
            raise ModelError(self.path, f"the GGUF has no key '{key}'; convert the model again with llama.cpp")
        value: Any = self._fields[key].contents()
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
        return self.need(key, kind) if key in self._fields else None

    def own(self, suffix: str, kind: type[T]) -> T | None:
        """The value of the model's own key, `<architecture>.<suffix>`, or None."""
        return self.get(f"{self.architecture}.{suffix}", kind)

    def own_suffixes(self) -> list[str]:
        """What stands behind `<architecture>.` in all keys that begin so."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self._fields if key.startswith(prefix)]


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Map the file and read its tables; raises ModelError for anything that is not a whole GGUF."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(path, f"cannot be read: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise ModelError(path, "is not a GGUF file (its first bytes are not 'GGUF')")
    try:
        return gguf.GGUFReader(path)
    # What the reader raises when a table or a tensor ends early depends on where the file was cut.
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(path, f"is a truncated or damaged GGUF ({reason}); download it again") from error
