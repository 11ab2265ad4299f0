"""What the reference model says of each completion: float32 log-probs a scored token, scored once and kept on disk.

A cache file belongs to one set of weights, dtype and way of computing (its header); a row belongs to its token ids and
scored spans. So shuffling, subsetting or appending data keeps rows valid, other weights never match, and a row that is
not there is computed, never read as 0.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from data_tools.encode import Group
from data_tools.file_digests import FileDigests
from trainer import dist
from trainer.batch import Stream, build_stream
from trainer.errors import RunError
from trainer.loader import length_sorted_batches
from trainer.models.decoder import Decoder
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
    prompt_length = group.lengths[0]
    start = sum(group.lengths[:branch])
    completion = group.ids[start : start + group.lengths[branch]]
    spans = group.spans[branch]
    digest = hashlib.sha256(np.array([prompt_length, len(completion), len(spans)], dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(group.ids[:prompt_length], dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(completion, dtype="<i4").tobytes())
    digest.update(np.array(spans, dtype="<i4").tobytes())
    return digest.digest()


class ReferenceCache:
    """Rows of one cache file, in memory; `save` writes the file whole and renames it into place."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        self._rows: dict[bytes, np.ndarray] = {}
        self._changed = False

    @classmethod
    def open(cls, path: Path, header: Header, *, named_by_user: bool) -> "ReferenceCache":
        """Read `path` if it is there. A file that the user named and that belongs to something else is refused."""
        cache = cls(path, header)
        if not path.exists():
            return cache
        try:
            found, (keys, offsets, logps) = _read(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            if named_by_user:
                raise RunError(path, f"is not a whole reference cache ({error}); delete it or leave it out") from None
            if dist.is_main():
                print(f"reference cache {path} is damaged ({error}); its rows are scored again")
            return cache
        differing = [name for name, value in asdict(header).items() if found.get(name) != value]
        if differing and named_by_user:
            shown = ", ".join(f"{n} {found.get(n)!r} instead of {getattr(header, n)!r}" for n in differing)
            raise RunError(path, f"is a reference cache of something else ({shown}); leave out reference.cache_file")
        if not differing:
            for index, key in enumerate(keys):
                cache._rows[key.tobytes()] = logps[offsets[index] : offsets[index + 1]]
        return cache

    def __len__(self) -> int:
        return len(self._rows)

    def missing(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with at least one completion that is not cached; repeats are named once."""
        wanted: dict[tuple[bytes, ...], Group] = {}
        for group in groups:
            keys = tuple(row_key(group, branch) for branch in range(1, len(group.lengths)))
            if any(key not in self._rows for key in keys):
                wanted.setdefault(keys, group)
        return list(wanted.values())

    def add(self, rows: dict[bytes, np.ndarray]) -> None:
        self._rows.update(rows)
        self._changed = self._changed or bool(rows)

    def token_logps(self, groups: Sequence[Group], stream: Stream) -> Tensor:
        """(N,) float32 in the order of `stream.score_targets`. A row that is absent or of another length is our bug."""
        rows = [self._rows[row_key(group, branch)] for group in groups for branch in range(1, len(group.lengths))]
        values = torch.from_numpy(np.concatenate(rows).astype(np.float32, copy=False)).to(stream.tokens.device)
        assert values.numel() == stream.score_targets.numel(), "cached rows do not fit the stream"
        return values

    def save(self) -> None:
        """Write the file if rows were added; a failure leaves the old file whole and raises RunError."""
        if not self._changed:
            return
        ensure_writable(self.path.parent)
        keys = sorted(self._rows)
        lengths = [len(self._rows[key]) for key in keys]
        tensors = {
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "token_logps": np.concatenate([self._rows[key] for key in keys]).astype(np.float32),
        }
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            header = json.dumps(asdict(self.header), sort_keys=True)
            save_file(tensors, temporary, metadata={"header": header, "sha256": _checksum(*tensors.values())})
            os.replace(temporary, self.path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise RunError(
                self.path, f"the reference cache cannot be written ({error}); set reference.cache_dir"
            ) from None
        self._changed = False


def _read(path: Path) -> tuple[dict[str, object], list[np.ndarray]]:
    """Header and the tensors keys, offsets and token_logps of a cache file; raises what damage of any kind raises."""
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        tensors = [file.get_tensor(name) for name in ("keys", "offsets", "token_logps")]
    if metadata["sha256"] != _checksum(*tensors):
        raise ValueError("its numbers differ from their sha256")
    return dict(json.loads(metadata["header"])), tensors


def _checksum(*tensors: np.ndarray) -> str:
    """sha256 over the tensors' bytes: a flipped bit in a log-prob would bias the training without a sign of it."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(np.ascontiguousarray(tensor).data)
    return total.hexdigest()


@torch.no_grad()
def score_rows(model: Decoder, groups: Sequence[Group], *, tokens_per_batch: int) -> dict[bytes, np.ndarray]:
    """Float32 log-probs of every scored completion token, by row key; this rank scores its share, all ranks get all."""
    mine = list(groups)[dist.rank() :: dist.world_size()]
    rows: dict[bytes, np.ndarray] = {}
    for batch in length_sorted_batches(mine, tokens_per_batch):
        members = [mine[index] for index in batch]
        stream = build_stream(members)
        values = model(stream.to(model.head_weight.device)).cpu().numpy()
        stops = np.cumsum(stream.segment_tokens.numpy())
        segment = 0
        for group in members:
            for branch in range(len(group.lengths)):
                if branch:
                    stop = stops[segment]
                    rows[row_key(group, branch)] = values[stop - int(stream.segment_tokens[segment]) : stop].copy()
                segment += 1
    merged: dict[bytes, np.ndarray] = {}
    for part in dist.gather_objects(rows):
        merged.update(part)
    return merged
