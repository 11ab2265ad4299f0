"""Files of prompts to sample from and of samples drawn, the same for a local model and for a server.

Prompts, JSON Lines; other columns are ignored:

    {"id": "q1", "prompt": "Why is the sky blue?", "settings": {"temperature": 0.7, "n": 4}}
    {"id": "q2", "messages": [{"role": "user", "content": "Why?"}]}

    id         string or whole number, unique in the file; left out: `<file name>:<line>`
    prompt     a string, or a list of messages that ends with the user (then it may be called `messages`)
    prefix     a string, optional: how the answer begins; what is sampled goes on from there, and is `text` alone
    settings   an object, optional: what differs for this row; its keys are judged by the command that samples

Samples, JSON Lines, one row a sample; `prompt_tokens` and below may be null or left out:

    id, sample        whose prompt, and which of its samples (0, 1, ...); a pair of them stands once in a file
    text              the completion alone, special tokens left out
    finish_reason     "stop" (it ended itself or by a stop string), "length" (cut off), or what else a server says
    model             as the user named it
    settings_digest   `digest_of` the sampling settings, so that a file is not filled from two kinds of sampling
    prompt_digest     `digest_of` the prompt (with its prefix), so that an id is not taken for another prompt's
    prompt_tokens, completion_tokens   counts
    logprobs          nats of each token of the completion, as sampled
    reasoning         what a server gives apart from the text as the model's thinking

A row is written by one write, with its line end. A process that is killed leaves at most one torn row, the last: a line
without its end that is not JSON. Readers skip it and count it, a writer cuts it off before it goes on. Any other line
that is not a sample is an error. Nothing is sampled here.
"""

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import DECODER, iter_jsonl, line_of
from data_tools.schema import Message, Text, check_prompt

SYNC_S = 1.0
"""Written rows are put on the disk at most so much later; a killed process loses none, a power cut these."""

OPTIONAL_FIELDS = ("prompt_tokens", "completion_tokens", "logprobs", "reasoning")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A checked row of a prompts file."""

    id: str
    prompt: Text
    settings: Mapping[str, Any]
    path: str
    line: int
    prefix: str = ""

    @property
    def digest(self) -> str:
        """`prompt_digest` of its samples."""
        return prompt_digest(self.prompt, self.prefix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row of a samples file; the fields are explained above."""

    id: str
    sample: int
    text: str
    finish_reason: str
    model: str
    settings_digest: str
    prompt_digest: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprobs: tuple[float, ...] | None = None
    reasoning: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        """(id, sample): once in a file."""
        return self.id, self.sample


@dataclass(frozen=True, slots=True)
class SamplesRead:
    """What a samples file holds; torn is 1 where a last row was cut off by a kill, else 0."""

    samples: list[Sample]
    torn: int


def canonical_json(value: object) -> str:
    """One text for equal values: sorted keys, no spaces, ASCII. Raises ValueError for NaN and what is not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: object) -> str:
    """First 16 hex digits of sha256 over canonical JSON of a JSON value, or of a prompt as `Prompt` holds it."""
    if isinstance(value, tuple) and value and isinstance(value[0], Message):
        value = messages_of(value)
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def prompt_digest(prompt: Text, prefix: str = "") -> str:
    """`digest_of` what a sample goes on from: the prompt, and its prefix where there is one."""
    if not prefix:
        return digest_of(prompt)
    return digest_of({"prompt": prompt if isinstance(prompt, str) else messages_of(prompt), "prefix": prefix})


def messages_of(prompt: Text) -> list[dict[str, str]]:
    """A prompt as a list of {"role", "content"}; a string is one message of the user."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": message.role, "content": message.content} for message in prompt]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read and check a prompts file; one of no bytes holds no prompts, as a step writes it that has nothing to ask.

    Raises DataErrors with up to 20 faults; an id may stand only once.
    """
    seen: dict[str, int] = {}

    def check(row: tuple[int, object]) -> Prompt:
        line, value = row
        record = check_prompt(value, path=path, line=line)
        assert isinstance(value, dict)
        settings = value.get("settings", {})
        if not isinstance(settings, dict):
            raise DataError(path, line, field="settings", problem='expected an object like {"temperature": 0.7}')
        prefix = value.get("prefix", "")
        if not isinstance(prefix, str):
            raise DataError(path, line, field="prefix", problem="expected a string: how the answer begins")
        first = seen.setdefault(record.id, line)
        if first != line:
            raise DataError(path, line, field="id", problem=f"'{record.id}' already stands in line {first}")
        return Prompt(record.id, record.prompt, settings, str(path), line, prefix)

    return check_each(iter_jsonl(path, may_be_empty=True), check)


def read_samples(path: str | Path) -> SamplesRead:
    """Read and check a samples file, plain JSON Lines. An empty file holds no samples.

    Raises DataError for a file that cannot be read, a row that is not a sample, an (id, sample) that stands twice.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(path, None, field=None, problem=f"cannot be read: {error.strerror or error}") from error
    samples, whole = _parse(path, content)
    return SamplesRead(samples, int(whole < len(content)))


def begin_from(out: Path, earlier: str | Path) -> None:
    """Let a samples file that is not there begin with the rows of an earlier one. Raises UserError."""
    if out.exists():
        return
    rows = b"".join(row_of(sample) for sample in read_samples(earlier).samples)
    part = out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(rows)
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error


class SampleWriter:
    """Appends rows to a samples file that may already hold some; one writer at a time, held by a lock on the file.

    `samples` are the rows that were there, `torn` counts a row cut off by a kill and now removed. Raises DataError for
    a file that holds something else, UserError when another process writes it or it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = -1
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._lock()
            self.samples, self.torn = self._take_up()
        except OSError as error:
            self._close()
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        except BaseException:
            self._close()
            raise
        self._there = {sample.key: sample for sample in self.samples}
        self._synced = time.monotonic()

    def missing(
        self, id: str, samples: Iterable[int], *, model: str, settings_digest: str, prompt_digest: str
    ) -> tuple[int, ...]:
        """Those of the `samples` of prompt `id` that the file lacks. Raises UserError for one of another kind."""
        found = []
        for number in samples:
            sample = self._there.get((id, number))
            if sample is None:
                found.append(number)
                continue
            other = [] if sample.model == model else [f"model ('{sample.model}')"]
            other += [] if sample.settings_digest == settings_digest else ["settings"]
            other += [] if sample.prompt_digest == prompt_digest else ["prompt"]
            if other:
                problem = f"sample {number} of id '{id}' was drawn with another {' and '.join(other)}"
                raise UserError(f"{self.path}: {problem}; name another --out")
        return tuple(found)

    def append(self, sample: Sample) -> None:
        """Write one row. Raises UserError when the disk is full or gone, ValueError for a key that is there."""
        if sample.key in self._there:
            raise ValueError(f"{self.path}: sample {sample.sample} of id '{sample.id}' is already there")
        data = row_of(sample)
        end = os.fstat(self._file).st_size
        try:
            write_whole(self._file, data)
            if time.monotonic() - self._synced > SYNC_S:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            os.ftruncate(self._file, end)
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self._there[sample.key] = sample

    def close(self) -> None:
        """Put everything on the disk and let go of the file."""
        if self._file >= 0:
            os.fsync(self._file)
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is writing it; wait, or name another file") from None

    def _take_up(self) -> tuple[list[Sample], int]:
        with open(self._file, "rb", closefd=False) as file:
            content = file.read()
        samples, whole = _parse(self.path, content)
        if whole < len(content):
            os.ftruncate(self._file, whole)
        elif content and not content.endswith(b"\n"):
            write_whole(self._file, b"\n")
        return samples, int(whole < len(content))

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def write_whole(descriptor: int, data: bytes) -> None:
    """os.write until all is written (a full disk may take a part). Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def row_of(sample: Sample) -> bytes:
    """The sample as one line of JSON with its end; optional fields that are None are left out."""
    row = {field.name: getattr(sample, field.name) for field in fields(sample)}
    row = {name: value for name, value in row.items() if value is not None or name not in OPTIONAL_FIELDS}
    return line_of(row)


def _parse(path: str | Path, content: bytes) -> tuple[list[Sample], int]:
    """All samples, and how many bytes are whole rows: less than all when the last row is torn."""
    samples: list[Sample] = []
    lines_by_key: dict[tuple[str, int], int] = {}
    whole = 0
    for number, raw in enumerate(content.splitlines(keepends=True) if content else [], start=1):
        if raw.strip():
            try:
                value = DECODER.decode(raw.decode("utf-8").rstrip("\r\n"))
            except (ValueError, RecursionError):
                if whole + len(raw) == len(content) and not raw.endswith(b"\n"):
                    return samples, whole
                raise DataError(path, number, field=None, problem="is not a row of JSON; repair or remove it") from None
            sample = _check(path, number, value)
            first = lines_by_key.setdefault(sample.key, number)
            if first != number:
                problem = f"sample {sample.sample} of id '{sample.id}' already stands in line {first}; keep one"
                raise DataError(path, number, field="sample", problem=problem)
            samples.append(sample)
        whole += len(raw)
    return samples, whole


def _check(path: str | Path, line: int, row: object) -> Sample:
    """One decoded row as a Sample. Raises DataError."""
    if not isinstance(row, dict):
        raise DataError(path, line, field=None, problem="expected an object with id, sample, text, ...")
    values: dict[str, Any] = {}
    for field, (wanted, is_right) in _CHECKS.items():
        value = row.get(field)
        if field in OPTIONAL_FIELDS and value is None:
            continue
        if field not in row:
            raise DataError(path, line, field=field, problem="missing: this is not a row of samples")
        if not is_right(value):
            raise DataError(path, line, field=field, problem=f"expected {wanted}, got {json.dumps(value)[:40]}")
        values[field] = tuple(value) if isinstance(value, list) else value
    return Sample(**values)


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_logprobs(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(x, int | float) and math.isfinite(x) for x in value)


_CHECKS = {
    "id": ("a string", _is_string),
    "sample": ("a whole number from 0", _is_count),
    "text": ("a string", _is_string),
    "finish_reason": ("a string", _is_string),
    "model": ("a string", _is_string),
    "settings_digest": ("a string", _is_string),
    "prompt_digest": ("a string", _is_string),
    "prompt_tokens": ("a whole number", _is_count),
    "completion_tokens": ("a whole number", _is_count),
    "logprobs": ("a list of numbers", _are_logprobs),
    "reasoning": ("a string", _is_string),
}
