"""What the reference model says of each completion: float32 log-probs a scored token, kept in one file on disk.

A cache file belongs to one set of weights, dtype and way of computing (its header); a row belongs to its token ids and
scored spans. So shuffling, subsetting or appending data keeps rows valid, other weights never match, and a row that is
not there is computed (`reference_pass`), never read as 0. `python -m trainer.reference --check` explains a file.

Several processes may fill one file at once: a save reads it again under a lock, and a row that is there stays as it is.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from data_tools.encode import Group
from data_tools.file_digests import FileDigests
from trainer import dist
from trainer.batch import Stream
from trainer.errors import RunError
from trainer.models.hf_weights import weight_files
from trainer.run_folder import ensure_writable

FORMAT = "logratio-reference-1"


@dataclass(frozen=True)
class Header:
    """What cached numbers depend on besides the row itself. Another value of any field is another cache file."""

    weights: str
    """sha256 over the model's config.json and weight files."""
    dtype: str
    kernel: str
    attention: str = "prefix-shared-1"
    quantisation: str = "none"
    format: str = FORMAT

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def weights_digest(folder: str | Path, digests: FileDigests) -> str:
    """sha256 over config.json and every weight file; unchanged files are not read again."""
    total = hashlib.sha256()
    for path in [Path(folder) / "config.json", *weight_files(folder)]:
        total.update(f"{path.name} {digests.sha256(path)}\n".encode())
    return total.hexdigest()


def row_key(group: Group, branch: int) -> bytes:
    """sha256 of prompt ids, completion ids and scored spans of one completion."""
    prompt_length, length, spans = group.lengths[0], group.lengths[branch], group.spans[branch]
    ids = np.ascontiguousarray(group.ids, dtype="<i4")
    start = sum(group.lengths[:branch])
    digest = hashlib.sha256(struct.pack("<3i", prompt_length, length, len(spans)))
    digest.update(ids[:prompt_length])
    digest.update(ids[start : start + length])
    digest.update(struct.pack(f"<{2 * len(spans)}i", *chain.from_iterable(spans)))
    return digest.digest()


def row_keys(group: Group) -> tuple[bytes, ...]:
    """The keys of a group's completions, in order."""
    return tuple(row_key(group, branch) for branch in range(1, len(group.lengths)))


class ReferenceCache:
    """Rows of one cache file, in memory; `save` writes the file whole and renames it into place."""

    def __init__(self, path: Path, header: Header, *, named_by_user: bool = False) -> None:
        self.path = path
        self.header = header
        self._named_by_user = named_by_user
        self._rows: dict[bytes, np.ndarray] = {}
        self._changed = False

    @classmethod
    def open(cls, path: Path, header: Header, *, named_by_user: bool) -> "ReferenceCache":
        """Read `path` if it is there. A file that the user named and that belongs to something else is refused."""
        cache = cls(path, header, named_by_user=named_by_user)
        cache.read()
        return cache

    def read(self) -> None:
        """Take over the rows of the file as it is now, in place of own ones of the same keys, so that this process goes
        on with what a later one will find. Raises RunError for a file that the user named and that does not fit."""
        if not self.path.exists():
            return
        try:
            found, rows = read_cache_file(self.path)
        except ValueError as error:
            if self._named_by_user:
                raise RunError(
                    self.path, f"is not a whole reference cache ({error}); delete it or leave it out"
                ) from None
            if dist.is_main():
                print(f"reference cache {self.path} is damaged ({error}); its rows are scored again", flush=True)
            return
        differing = differing_fields(found, self.header)
        if not differing:
            self._rows.update(rows)
        elif self._named_by_user:
            raise RunError(
                self.path, f"is a reference cache of something else ({differing}); leave out reference.cache_file"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def missing(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with a completion that is not cached here or on another rank, repeats once; the same on every rank.

        Every rank calls it with the same groups. Ranks may have read different files: another job saves between two
        reads, or the nodes share no disk.
        """
        keys = [row_keys(group) for group in groups]
        lacking = np.array([any(key not in self._rows for key in own) for own in keys], dtype=bool)
        for bits in dist.gather_objects(np.packbits(lacking)):
            lacking |= np.unpackbits(bits, count=len(groups)).astype(bool)
        wanted: dict[tuple[bytes, ...], Group] = {}
        for index in np.flatnonzero(lacking):
            wanted.setdefault(keys[index], groups[index])
        return list(wanted.values())

    def add(self, rows: dict[bytes, np.ndarray]) -> None:
        """Take in rows, float32 (scored tokens,) by `row_key`; a row that is there already stays as it is."""
        before = len(self._rows)
        for key, row in rows.items():
            self._rows.setdefault(key, row)
        self._changed = self._changed or len(self._rows) > before

    def token_logps(self, groups: Sequence[Group], stream: Stream) -> Tensor:
        """(N,) float32 in the order of `stream.score_targets`. A row that is absent or of another length is our bug."""
        rows = [self._rows[key] for group in groups for key in row_keys(group)]
        values = torch.from_numpy(np.concatenate(rows).astype(np.float32, copy=False)).to(stream.tokens.device)
        assert values.numel() == stream.score_targets.numel(), "cached rows do not fit the stream"
        return values

    def save(self) -> None:
        """Write the file if rows were added, with what other processes have put there meanwhile. Raises RunError, which
        leaves the old file whole."""
        if not self._changed:
            return
        ensure_writable(self.path.parent)
        try:
            with _locked(self.path):
                self.read()
                self._write()
        except (OSError, SafetensorError) as error:
            raise RunError(
                self.path, f"the reference cache cannot be written ({error}); set reference.cache_dir"
            ) from None
        self._changed = False

    def _write(self) -> None:
        """Keys in ascending order, so that the same rows have the same checksum."""
        keys = sorted(self._rows)
        lengths = [len(self._rows[key]) for key in keys]
        tensors = {
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "token_logps": np.concatenate([self._rows[key] for key in keys]).astype(np.float32),
        }
        metadata = {
            "header": json.dumps(asdict(self.header), sort_keys=True),
            "sha256": _checksum(*tensors.values()),
        }
        temporary = _beside(self.path, ".tmp")  # one name: under the lock, what lies there a killed process left
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_cache_file(path: str | Path) -> tuple[dict[str, object], dict[bytes, np.ndarray]]:
    """A cache file's header as it is there, and its rows by key. Raises ValueError for damage of any kind."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            keys, offsets, logps = (file.get_tensor(name) for name in ("keys", "offsets", "token_logps"))
        if metadata["sha256"] != _checksum(keys, offsets, logps):
            raise ValueError("its numbers differ from their sha256")
        header = dict(json.loads(metadata["header"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no {error}" if isinstance(error, KeyError) else str(error)) from None
    ends = offsets.tolist()
    return header, {key.tobytes(): logps[ends[i] : ends[i + 1]] for i, key in enumerate(keys)}


def differing_fields(found: dict[str, object], wanted: Header) -> str:
    """What a file's header says otherwise than `wanted`, in words; empty where they agree."""
    return ", ".join(
        f"{name} {found.get(name)!r} instead of {value!r}"
        for name, value in asdict(wanted).items()
        if found.get(name) != value
    )


def _checksum(*tensors: np.ndarray) -> str:
    """sha256 over the tensors' bytes: a flipped bit in a log-prob would bias the training without a sign of it."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(np.ascontiguousarray(tensor).data)
    return total.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, for the moment of a save; the kernel frees the lock of one that dies. The empty lock file
    stays: removing it would let two processes lock two files of that name."""
    with open(_beside(path, ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
