"""Encoded groups on disk: memory-mapped arrays in a folder named after everything that decides their content.

A shard is built once, by one process, before any process group exists; everybody else maps it. Data, tokenizer, chat
template, options or the encoding code that differ give another key, hence another folder, so a stale shard cannot be
opened. No pickle anywhere. The whole cache folder may be deleted at any time.

    <cache>/<key>/            tokens.npy ...   the arrays of ARRAYS, and of LABEL_ARRAYS where there are labels
                              manifest.json    written last: what it was made from, and each file's size and sha256
    <cache>/<key>.building/   a build in progress, or what a killed one left; the next build removes it
    <cache>/<key>.lock        held while building (empty, left behind)
    <cache>/digests.json      sha256 of files by their status, see `file_digests`

Letters: G groups, B branches of all groups, S scored spans of all branches, T tokens of all groups.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_tools import (
    chat_template,
    encode,
    jsonl,
    render,
    schema,
    step_rows,
    step_text,
    template_filters,
    template_sandbox,
    tokenizer,
    tokenizer_bytes,
    tokenizer_library,
    tokenizer_pieces,
    tokenizer_specials,
)
from data_tools.chat_template import ChatTemplate, load_chat_template
from data_tools.disk import sync, user_cache
from data_tools.encode import EncodeOptions, EncodeReport, Group, encode_records
from data_tools.errors import DataError, UserError
from data_tools.file_digests import FileDigests, hash_file, stamp
from data_tools.jsonl import read_records
from data_tools.step_rows import StepLabel
from data_tools.tokenizer import Tokenizer, load_tokenizer

ARRAYS: dict[str, type[np.generic]] = {
    "tokens": np.int32,  # (T,)
    "group_offsets": np.int64,  # (G + 1,) into tokens
    "branch_lengths": np.int32,  # (B,)
    "branch_offsets": np.int64,  # (G + 1,) into branch_lengths
    "spans": np.int32,  # (S, 2) start and end, counted from the branch's start
    "span_offsets": np.int64,  # (B + 1,) into spans
    "weights": np.float64,  # (G,)
    "id_bytes": np.uint8,  # utf-8 of all record ids
    "id_offsets": np.int64,  # (G + 1,) into id_bytes
}
LABEL_ARRAYS: dict[str, type[np.generic]] = {"labels": np.float32}
"""(S, 4), a StepLabel for each span. Only in shards of steps: the others keep their digest, hence their order."""
MANIFEST = "manifest.json"

# Modules that decide what a shard holds. Their text is part of the key: new code never opens what old code encoded.
_ENCODING_MODULES = (
    *(tokenizer, tokenizer_bytes, tokenizer_library, tokenizer_pieces, tokenizer_specials),
    *(schema, step_rows, jsonl, chat_template, template_filters, template_sandbox, render, step_text, encode),
)
_ENCODING_FILES = [__file__, *(module.__file__ for module in _ENCODING_MODULES)]


class Shard(Sequence[Group]):
    """Groups of one shard folder, read through memory maps.

    digest: sha256 of the content (not of the inputs), so the order of work, which depends on it, stays the same when a
    shard is rebuilt to the same groups. group_tokens: (G,) int64, tokens of each group, all branches together.
    reused: the folder was there before; False only for the caller that built it.
    """

    def __init__(self, folder: Path, report: EncodeReport, digest: str, *, reused: bool) -> None:
        self.folder, self.report, self.digest, self.reused = folder, report, digest, reused
        names = [*ARRAYS, *(name for name in LABEL_ARRAYS if (folder / f"{name}.npy").exists())]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        # Plain arrays over the same maps: slicing a np.memmap costs six times as much.
        self._arrays = {name: array.view(np.ndarray) for name, array in arrays.items()}
        self.group_tokens = np.diff(self._arrays["group_offsets"])

    def __len__(self) -> int:
        return len(self.group_tokens)

    def __getitem__(self, index: int) -> Group:  # type: ignore[override]  # no slices
        """Group `index`; its `ids` are a read-only view of the file."""
        i = range(len(self))[index]
        a = self._arrays
        first, last = a["branch_offsets"][i : i + 2].tolist()
        cuts = a["span_offsets"][first : last + 1].tolist()
        labels: tuple[tuple[StepLabel, ...], ...] = ()
        if "labels" in a:
            labels = tuple(tuple(map(StepLabel._make, a["labels"][s:e].tolist())) for s, e in pairwise(cuts))
        return Group(
            record_id=a["id_bytes"][slice(*a["id_offsets"][i : i + 2].tolist())].tobytes().decode(),
            ids=a["tokens"][slice(*a["group_offsets"][i : i + 2].tolist())],
            lengths=tuple(a["branch_lengths"][first:last].tolist()),
            spans=tuple(tuple(map(tuple, a["spans"][s:e].tolist())) for s, e in zip(cuts, cuts[1:], strict=False)),
            weight=float(a["weights"][i]),
            labels=labels,
        )

    @property
    def labels(self) -> np.ndarray | None:
        """(S, 4) float32, a StepLabel for each scored token in the order of the groups; None in a shard without."""
        return self._arrays.get("labels")

    def branch_lengths(self, index: int) -> tuple[int, ...]:
        """Tokens of each branch of group `index`, the prompt first, without building the group."""
        i = range(len(self))[index]
        return tuple(
            self._arrays["branch_lengths"][slice(*self._arrays["branch_offsets"][i : i + 2].tolist())].tolist()
        )


def open_or_build(
    files: Sequence[str], *, model_dir: str | Path, options: EncodeOptions, cache_dir: str | None = None
) -> Shard:
    """The shard of these JSONL files under this model's tokenizer and template, built if it is not there.

    cache_dir: where shards live; default $XDG_CACHE_HOME (or ~/.cache)/logratio/shards. Opening an unchanged shard
    hashes and tokenizes nothing. Processes that ask for the same shard at once wait for the one that builds it. A
    damaged shard is rebuilt, with a line on stderr.

    Raises UserError: data, tokenizer or template at fault, no row left, or a cache folder that cannot be written.
    """
    cache = Path(cache_dir).expanduser() if cache_dir is not None else user_cache("shards")
    with _cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    digests = FileDigests(cache / "digests.json")
    source = _Source(tuple(map(str, files)), Path(model_dir), options)
    stamps = source.stamps()
    inputs = source.inputs(digests)
    folder = cache / hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    shard = _open(folder, digests)
    if shard is None:
        with _locked(folder):
            shard = _open(folder, digests, say_damage=True) or _build(source, stamps, inputs, folder, digests)
    digests.save()
    return shard


def write_shard(groups: Sequence[Group], report: EncodeReport, folder: Path, inputs: dict[str, Any]) -> None:
    """Write the arrays and then the manifest into an existing empty folder, each flushed to the disk.

    inputs: what the groups were made from, for people who look. Raises OSError.
    """
    files = {}
    for name, array in _pack(groups).items():
        path = folder / f"{name}.npy"
        with open(path, "wb") as file:
            np.save(file, array, allow_pickle=False)
            _flush(file)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    manifest = {"groups": len(groups), "files": files, "report": dataclasses.asdict(report), "inputs": inputs}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        _flush(file)
    sync(folder)


def read_shard(folder: Path, digests: FileDigests, *, reused: bool = True) -> Shard:
    """Open a shard folder after checking it; raises ValueError or OSError that says what is damaged."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    names = [f"{name}.npy" for name in (*ARRAYS, *LABEL_ARRAYS) if name in ARRAYS or f"{name}.npy" in manifest["files"]]
    for name in names:
        if (folder / name).stat().st_size != manifest["files"][name]["bytes"]:
            raise ValueError(f"{name} has not the size that was written")
        if digests.sha256(folder / name) != manifest["files"][name]["sha256"]:
            raise ValueError(f"{name} has not the content that was written")
    content = "".join(f"{name} {manifest['files'][name]['sha256']}\n" for name in names)
    report = {key: tuple(value) if isinstance(value, list) else value for key, value in manifest["report"].items()}
    return Shard(folder, EncodeReport(**report), hashlib.sha256(content.encode()).hexdigest(), reused=reused)


class _Source:
    """What a shard is made from. Tokenizer and template are loaded when first asked for: opening needs neither."""

    def __init__(self, files: tuple[str, ...], model_dir: Path, options: EncodeOptions) -> None:
        self.files, self.model_dir, self.options = files, model_dir, options

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.model_dir)

    @cached_property
    def template(self) -> ChatTemplate | None:
        return load_chat_template(self.model_dir, self.options.chat_template)

    def inputs(self, digests: FileDigests) -> dict[str, Any]:
        """Everything that decides the content. File names belong to it: rows without an id are named after them."""
        with self._data_errors():
            data = [[Path(file).name, digests.sha256(file)] for file in self.files]
        options = dataclasses.asdict(self.options)
        override = options.pop("chat_template")
        code = hashlib.sha256("".join(map(hash_file, _ENCODING_FILES)).encode()).hexdigest()
        # Stamps of every file in the folder, since which of them count is the tokenizer's and the template's business.
        model_files = sorted(path for path in self.model_dir.glob("*") if path.is_file())
        if override is not None and Path(override).is_file():
            model_files.append(Path(override))
        name = f"text {code} {os.path.abspath(self.model_dir)} {override}"
        return {"data": data, "options": options, "code": code, "text": digests.of_files(name, model_files, self._text)}

    def _text(self) -> str:
        return f"tokenizer {self.tokenizer.digest} template {self.template.digest if self.template else None}"

    def stamps(self) -> list[list[int]]:
        with self._data_errors():
            return [stamp(file) for file in self.files]

    @contextlib.contextmanager
    def _data_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            read_records(self.files, kind=self.options.kind)  # says what is wrong with each file, as for its rows
            raise


def _build(
    source: _Source, stamps: list[list[int]], inputs: dict[str, Any], folder: Path, digests: FileDigests
) -> Shard:
    """Encode everything into `<folder>.building` and rename it; the caller holds the lock."""
    temporary = _beside(folder, ".building")
    with _cache_errors(folder.parent):  # before the long work, so that a folder that cannot be written is told at once
        _remove(temporary)
        temporary.mkdir()
    try:
        records = read_records(source.files, kind=source.options.kind)
        groups, report = encode_records(records, source.tokenizer, source.template, source.options)
        for file, before, after in zip(source.files, stamps, source.stamps(), strict=True):
            if before != after:
                raise DataError(
                    file, None, field=None, problem="changed while it was read; start again when it is complete"
                )
        with _cache_errors(folder.parent):
            write_shard(groups, report, temporary, inputs)
            _remove(folder)
            os.rename(temporary, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for name, of in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items():
        digests.remember_sha256(folder / name, of["sha256"])
    return read_shard(folder, digests, reused=False)


def _open(folder: Path, digests: FileDigests, *, say_damage: bool = False) -> Shard | None:
    """The shard, or None when it is not there or damaged."""
    if not folder.exists():
        return None
    try:
        return read_shard(folder, digests)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if say_damage:
            print(f"{folder}: the cached shard is damaged ({error}); building it again", file=sys.stderr, flush=True)
        return None


def _pack(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """The arrays of ARRAYS from groups."""
    branches = [length for group in groups for length in group.lengths]
    spans_of_branches = [spans for group in groups for spans in group.spans]
    spans = [span for spans in spans_of_branches for span in spans]
    ids = [group.record_id.encode() for group in groups]
    for group in groups:
        assert sum(group.lengths) == len(group.ids) and len(group.spans) == len(group.lengths), group.record_id
        assert not group.labels or [*map(len, group.labels)] == [*map(len, group.spans)], group.record_id
    values = {
        "tokens": np.concatenate([group.ids for group in groups]) if groups else [],
        "group_offsets": _offsets([len(group.ids) for group in groups]),
        "branch_lengths": branches,
        "branch_offsets": _offsets([len(group.lengths) for group in groups]),
        "spans": np.array(spans, dtype=np.int32).reshape(-1, 2),
        "span_offsets": _offsets([len(spans) for spans in spans_of_branches]),
        "weights": [group.weight for group in groups],
        "id_bytes": np.frombuffer(b"".join(ids), dtype=np.uint8),
        "id_offsets": _offsets([len(i) for i in ids]),
    }
    types = dict(ARRAYS)
    if any(group.labels for group in groups):
        types |= LABEL_ARRAYS
        values["labels"] = [label for group in groups for own in group.labels for label in own]
    return {name: np.asarray(values[name], dtype=dtype) for name, dtype in types.items()}


def _offsets(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time; the kernel frees the lock of one that dies."""
    with _cache_errors(folder.parent):
        file = open(_beside(folder, ".lock"), "w")  # noqa: SIM115  closed below, after the caller's work
    with file:
        with _cache_errors(folder.parent):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: another process is building this shard; waiting", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"disk full? {error}"  # numpy drops the cause of a short write
        raise UserError(
            f"{cache}: cannot write the shard cache ({reason}): make room or set data.cache_dir to another folder"
        ) from error


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
