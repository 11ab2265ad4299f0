"""The user's cache folder, and making sure that what was written is on the disk."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """$XDG_CACHE_HOME (or ~/.cache)/logratio/`name`; not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "logratio" / name


def sync(path: str | Path) -> None:
    """Return once a file's bytes, or a folder's entries, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
