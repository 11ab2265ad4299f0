"""Errors that a user can mend, each one line: where, what is wrong, what to do.

Commands catch `UserError`, print it and exit with code 2; any other exception is our own bug and keeps its traceback.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

MAX_ERRORS = 20
"""So many are collected before reading stops: enough to see the pattern, few enough to read."""


T, R = TypeVar("T"), TypeVar("R")


class UserError(ValueError):
    """Base of everything a user can cause and mend; `str()` is the whole message."""


class DataError(UserError):
    """One thing wrong with one row (or one file) of data: `pairs.jsonl:12: field 'chosen': expected ...`.

    `path` is printed as the user gave it; `line` counts from 1; a `line` or `field` of None is left out.
    """

    def __init__(self, path: str | Path, line: int | None, *, field: str | None, problem: str) -> None:
        self.path, self.line, self.field, self.problem = str(path), line, field, problem
        place = self.path if line is None else f"{self.path}:{line}"
        said = _one_line(problem if field is None else f"field '{field}': {problem}")
        super().__init__(f"{place}: {said}")


class DataErrors(UserError):
    """The `DataError`s of one reading, a line each, and a last line that counts them; a single one needs no count.

    `more` says that reading stopped early: the rest of the data was not looked at.
    """

    def __init__(self, errors: list[DataError], more: bool) -> None:
        self.errors, self.more = errors, more
        count = [f"{len(errors)} errors" + (", the rest was not checked" if more else "")] if len(errors) > 1 else []
        super().__init__("\n".join([*map(str, errors), *count]))


def check_each(items: Iterable[T], check: Callable[[T], R]) -> list[R]:
    """`check` of every item, in order. The DataErrors that it raises are collected: raises DataErrors with up to
    MAX_ERRORS of them, after which no further item is looked at."""
    checked: list[R] = []
    errors: list[DataError] = []
    for item in items:
        try:
            checked.append(check(item))
        except DataError as error:
            errors.append(error)
            if len(errors) == MAX_ERRORS:
                raise DataErrors(errors, more=True) from None
    if errors:
        raise DataErrors(errors, more=False)
    return checked


class TemplateError(UserError):
    """A chat template that is missing, cannot be read or cannot render: `path: problem`."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(f"{path}: {_one_line(problem)}")


class TokenizerError(UserError):
    """Tokenizer files that are missing, of an unknown kind or contradict each other: `path: problem`."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(f"{path}: {_one_line(problem)}")


def _one_line(text: str) -> str:
    """Characters that would break the line or steer a terminal are spelt out; a message may quote data."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
