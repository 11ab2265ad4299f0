"""Answers of servers on disk: one JSON Lines file that only grows, shared by any number of processes.

A line is {"digest": sha256 of the request, "answer": {...}}. It is written under a lock, whole. Where a process was
killed inside a write its torn line stays, skipped and counted; the next writer begins a new line after it. A digest is
written once, or again where its line turned out to be damaged: of two, the last counts.

`claim` keeps processes from asking for the same answer at the same time. A claim is a lock on a byte of the file
`<cache>.claims` whose place is the digest's: it ends with the process, however that ends. Where the system has no such
locks (open file description locks, Linux), every claim succeeds and two processes may both ask.

No key of a server is ever given to this module.
"""

import fcntl
import json
import os
import struct
import sys
import time
from dataclasses import asdict
from pathlib import Path

from data_tools.endpoint_request import Answer
from data_tools.errors import UserError
from data_tools.samples import SYNC_S, write_whole

MODE = 0o600
"""Prompts and answers may be private."""
CHUNK = 1 << 20
HEAD = b'{"digest": "'
DIGEST_LENGTH = 64
CAN_CLAIM = sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK")


class AnswerCache:
    """`get`, `put`, `claim` and `release` by request digest (64 hex digits). Not for several threads at once.

    damaged: lines seen that are no entry (torn by a kill, or worse). Raises UserError where the file cannot be opened,
    written or read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damaged = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._scanned = 0
        self._torn_at = -1
        self._claimed: set[str] = set()
        self._file = self._claims = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, MODE)
            if CAN_CLAIM:
                self._claims = os.open(f"{self.path}.claims", os.O_RDWR | os.O_CREAT, MODE)
            self._first_scan()
        except OSError as error:
            self.close()
            raise self._unusable(error) from error
        self._synced = time.monotonic()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, digest: str) -> Answer | None:
        """The answer under this digest, also when another process wrote it a moment ago."""
        try:
            if bytes.fromhex(digest) not in self._places:
                self._scan()
            place = self._places.get(bytes.fromhex(digest))
            return None if place is None else self._read(digest, *place)
        except OSError as error:
            raise self._unusable(error) from error

    def put(self, digest: str, answer: Answer) -> None:
        """Write an answer; one that is there stays."""
        line = HEAD + digest.encode() + b'", "answer": ' + json.dumps(asdict(answer)).encode() + b"}\n"
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._scan()
                if bytes.fromhex(digest) not in self._places:
                    end = os.fstat(self._file).st_size
                    torn = end > 0 and os.pread(self._file, 1, end - 1) != b"\n"
                    write_whole(self._file, b"\n" + line if torn else line)
                    self._scan()
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            raise self._unusable(error) from error

    def claim(self, digest: str) -> bool:
        """True: this process is the one to ask, until `release`. False: another one is asking."""
        if not CAN_CLAIM:
            return True
        if not self._lock(digest, fcntl.F_WRLCK):
            return False
        self._claimed.add(digest)
        return True

    def release(self, digest: str) -> None:
        """End a claim; one that was never made is no error."""
        if digest in self._claimed:
            self._claimed.remove(digest)
            self._lock(digest, fcntl.F_UNLCK)

    def close(self) -> None:
        """Put everything on the disk and end all claims."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
        if self._claims >= 0:
            os.close(self._claims)
        self._file = self._claims = -1

    def _lock(self, digest: str, kind: int) -> bool:
        """Set or lift the lock of a digest; struct flock as Linux lays it out: type, whence, start, length, pid."""
        place = int(digest[:15], 16)
        wanted = struct.pack("@hhqqi4x", kind, os.SEEK_SET, place, 1, 0)
        try:
            fcntl.fcntl(self._claims, fcntl.F_OFD_SETLK, wanted)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise self._unusable(error) from error
        return True

    def _first_scan(self) -> None:
        """Under the lock nobody is inside a write: a last line without its end is torn."""
        fcntl.flock(self._file, fcntl.LOCK_SH)
        try:
            self._scan()
            if self._scanned < os.fstat(self._file).st_size:
                self._torn_at = self._scanned
                self.damaged += 1
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _scan(self) -> None:
        """Take up the whole lines that were added since the last look."""
        size = os.fstat(self._file).st_size
        rest = b""
        while self._scanned + len(rest) < size:
            block = os.pread(self._file, CHUNK, self._scanned + len(rest))
            if not block:
                break
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self._take_up(line)
                self._scanned += len(line) + 1

    def _take_up(self, line: bytes) -> None:
        end = len(HEAD) + DIGEST_LENGTH
        try:
            digest = bytes.fromhex(line[len(HEAD) : end].decode())
        except ValueError:
            digest = b""
        if not line.startswith(HEAD) or not line.endswith(b"}}") or len(digest) * 2 != DIGEST_LENGTH:
            self.damaged += bool(line) and self._scanned != self._torn_at
            return
        self._places[digest] = (self._scanned, len(line))

    def _read(self, digest: str, start: int, length: int) -> Answer | None:
        try:
            row = json.loads(os.pread(self._file, length, start))
            values = dict(row["answer"])
            if values.get("logprobs") is not None:
                values["logprobs"] = tuple(values["logprobs"])
            return Answer(**values)
        except (ValueError, TypeError, KeyError):
            self.damaged += 1
            del self._places[bytes.fromhex(digest)]
            return None

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: the cache of answers cannot be used: {error.strerror or error}; name another")
