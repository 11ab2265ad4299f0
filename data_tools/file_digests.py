"""What was computed from files, remembered for as long as the files stay as they are.

Hashing a large file takes seconds, asking for its status takes microseconds. So a sha256 is kept in a small JSON file
with the file's size, mtime, ctime and inode, and is computed again when any of them differs.

- A changed byte under the same size and a restored mtime (`touch -r`, `cp -p`, `rsync -t`) is noticed: the kernel sets
  ctime, which no ordinary program can set back. A chmod or a rename costs one more hashing, no more.
- Time stamps have a grain (2 s on the coarsest file systems). What was written less than `GRAIN_S` ago is hashed, but
  not remembered, since a second write in the same grain would look like none.
- Bits that rot on the disk change no status: they are noticed at the next hashing only.
- The JSON file is a convenience. If it is missing, broken or cannot be written, files are hashed again; when two
  processes write it at once, the later one wins.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

GRAIN_S = 2.0

Stamp = list[int]


def stamp(path: str | Path) -> Stamp:
    """[size, mtime in ns, ctime in ns, inode] of a file; raises OSError where there is none."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def hash_file(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileDigests:
    """Values computed from files, in memory and (after `save`) in the file `memo`."""

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        self._entries = _read(memo)
        self._changed = False

    def sha256(self, path: str | Path) -> str:
        """sha256 of a file in hex, remembered; raises OSError for a file that cannot be read."""
        return self.of_files(_sha256_name(path), [path], lambda: hash_file(path))

    def of_files(self, name: str, paths: Iterable[str | Path], compute: Callable[[], str]) -> str:
        """`compute()`, or what it gave under this name when the same files had the same stamps."""
        stamps = _stamps(paths)
        entry = self._entries.get(name)
        if isinstance(entry, dict) and entry.get("files") == stamps and isinstance(entry.get("value"), str):
            return entry["value"]
        value = compute()
        if _stamps(stamps) == stamps and _settled(stamps):
            self._remember(name, stamps, value)
        return value

    def remember_sha256(self, path: str | Path, sha256: str) -> None:
        """Note the digest of a file that this process wrote itself and nobody else writes to."""
        self._remember(_sha256_name(path), _stamps([path]), sha256)

    def save(self) -> None:
        """Write the memo if it changed, without what belongs to files that are gone; a failure is not an error."""
        if not self._changed:
            return
        kept = {name: entry for name, entry in self._entries.items() if all(map(os.path.exists, entry["files"]))}
        temporary = self._memo.with_name(f"{self._memo.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(temporary, self._memo)
        except OSError:
            temporary.unlink(missing_ok=True)
        self._changed = False

    def _remember(self, name: str, stamps: dict[str, Stamp], value: str) -> None:
        self._entries[name] = {"files": stamps, "value": value}
        self._changed = True


def _sha256_name(path: str | Path) -> str:
    return f"sha256 {os.path.abspath(path)}"


def _stamps(paths: Iterable[str | Path]) -> dict[str, Stamp]:
    return {os.path.abspath(path): stamp(path) for path in paths}


def _settled(stamps: dict[str, Stamp]) -> bool:
    newest_ns = max((max(mtime, ctime) for _, mtime, ctime, _ in stamps.values()), default=0)
    return time.time_ns() - newest_ns > GRAIN_S * 1e9


def _read(memo: Path) -> dict[str, dict]:
    try:
        entries = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {name: e for name, e in entries.items() if isinstance(e, dict) and isinstance(e.get("files"), dict)}
