"""Tables of a recipe's TOML with known keys, read by kind; a fault names file and table."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from data_tools.errors import UserError


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name most like this one, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def fail(path: Path, where: str, problem: str) -> NoReturn:
    """Raises UserError."""
    raise UserError(f"{path}: {where}: {problem}" if where else f"{path}: {problem}")


def read_tables(path: Path) -> dict[str, Any]:
    """The file as tomllib reads it. Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no TOML: {error}") from error


class CheckedTable:
    """A table whose keys are known, read by kind; every fault names the file and the table."""

    def __init__(self, path: str, where: str, table: object, known: Sequence[str]) -> None:
        self._path, self._where = Path(path), where
        if not isinstance(table, dict):
            fail(self._path, where, "expected a table")
        for key in table:
            if key not in known:
                self.fail(f"'{key}' is not known{nearest(key, known)}; known: {', '.join(known)}")
        self._table: dict[str, Any] = table

    def fail(self, problem: str) -> NoReturn:
        fail(self._path, self._where, problem)

    def __contains__(self, key: str) -> bool:
        return key in self._table

    def text(self, key: str, pattern: re.Pattern[str] | None = None, default: str | None = None) -> str:
        """A string; one without default must be there and not be empty."""
        value = self._table.get(key, default)
        if value is None:
            self.fail(f"'{key}' is missing")
        if not isinstance(value, str) or (default is None and not value):
            self.fail(f"'{key}': expected a text")
        if pattern and not pattern.fullmatch(value):
            self.fail(f"'{key}': '{value}' has other characters than letters, digits, _ and -")
        return value

    def optional(self, key: str) -> str | None:
        return self.text(key) if key in self else None

    def count(self, key: str, default: str | None = None) -> str | None:
        """A whole number, or a text (a placeholder) that becomes one."""
        value = self._table.get(key, default)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.fail(f"'{key}': expected a whole number or a placeholder, got {value!r}")
        return str(value)

    def texts(self, key: str, *, single: bool = False) -> tuple[str, ...]:
        value = self._table.get(key, [])
        if single and isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(own, str) and own for own in value):
            self.fail(f"'{key}': expected a list of texts")
        return tuple(value)

    def flag(self, key: str) -> bool:
        value = self._table.get(key, False)
        if not isinstance(value, bool):
            self.fail(f"'{key}': expected true or false")
        return value

    def table(self, key: str) -> dict[str, Any]:
        value = self._table.get(key, {})
        if not isinstance(value, dict):
            self.fail(f"'{key}': expected a table")
        return value

    def get(self, key: str) -> Any:
        return self._table.get(key)
