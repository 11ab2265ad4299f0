"""What a user of the trainer can get wrong, as exceptions whose text is one line: where, what, what to do.

Programs turn any `UserError` into that line and exit code 2. Our own bugs are ordinary exceptions with a traceback.
"""

from pathlib import Path

from data_tools.errors import UserError

__all__ = ["ABSENT", "CheckpointError", "ConfigError", "ModelError", "RunError", "TrainingStopped", "UserError"]

ABSENT = object()
"""Passed to `ConfigError` where there is no value to show; None is a value."""


class ConfigError(UserError):
    """A key of the configuration: `loss.beta = -1: must be > 0`, or `data.train: required` without a value."""

    def __init__(self, key: str, value: object, problem: str) -> None:
        self.key = key
        shown = "" if value is ABSENT else f" = {_shorten(show_value(value))}"
        super().__init__(f"{key}{shown}: {problem}")


class _PathError(UserError):
    """Something on disk: `path: problem`, with the path as the user gave it."""

    def __init__(self, path: str | Path, problem: str) -> None:
        self.path = str(path)
        super().__init__(f"{path}: {problem}")


class ModelError(_PathError):
    """A model folder that cannot be loaded."""


class CheckpointError(_PathError):
    """A checkpoint that cannot be resumed from."""


class RunError(_PathError):
    """A run folder or the machine under it: in use, not writable, full."""


class TrainingStopped(Exception):
    """Training ended early for a reason to be named in one line: non-finite numbers, a full disk. Exit code 1."""


def show_value(value: object) -> str:
    """A configuration value as it is written in TOML and on the command line, on one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(show_value(item) for item in value)
    # Control characters would break the line; letters of any language stay as they are.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
