"""What a recipe would do and cost, before it does: a table of stages with model calls, tokens and time.

Counted where the prompts are there: a row's samples times `max_tokens` bounds what is generated, bytes / 4 estimates
what is read. Time is that bound over the tokens a second of a stage of this work folder (the same stage in another
turn, else the same model, else any), for a stage without calls what it took before. `?` is what is not known yet; what
was counted when the stage last ran stands behind it. Nothing is written.
"""

import collections
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.errors import UserError
from data_tools.jsonl import iter_jsonl
from data_tools.pipeline_recipe import Calls, Loop, Recipe
from data_tools.pipeline_stages import Step, label, makers, masked, walk
from data_tools.pipeline_state import Record, WorkFolder

BYTES_PER_TOKEN = 4
"""Of English; other scripts have fewer tokens or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Model calls, tokens read (estimated) and generated (at most), seconds; None: not known, 0: none."""

    calls: int | None = 0
    tokens_in: int | None = 0
    tokens_out: int | None = 0
    seconds: float | None = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the plan; last: what the stage's last run (or turn) counted, for what is not known now."""

    label: str
    state: str
    cost: Cost
    asks: bool
    last: Mapping[str, Any]


def plan(recipe: Recipe, folder: WorkFolder, chosen: Callable[[Step], bool]) -> list[Row]:
    """A row a step; loops that may end early are shown with all their turns. Raises UserError."""
    made: dict[str, Step] = {}
    waiting: set[str] = set()
    records: list[tuple[Step, Record]] = []
    rows = []

    def stopped(loop: Loop, turn: int, path: str) -> bool:
        by = makers(made, path)
        return bool(by) and not any(step.key in waiting for step in by) and says_stop(path)

    for step in walk(recipe, stopped):
        record = folder.record(step.key)
        before = next((by for path in step.inputs for by in makers(made, path) if by.key in waiting), None)
        made |= dict.fromkeys(step.outputs, step)
        if not chosen(step):
            rows.append(Row(label=label(step), state="passed over", cost=Cost(), asks=False, last={}))
            continue
        goes_on = False
        if before is not None:
            state = f"waits for {label(before)}"
        else:
            status = folder.status(step)
            goes_on = status.goes_on
            state = status.state if status.state == "done" else f"{status.state}: {status.why}"
        cost = Cost()
        if state != "done":
            waiting.add(step.key)
            cost = _cost(step, records, record, known=_prompts_known(step, made, waiting), goes_on=goes_on)
        if record:
            records.append((step, record))
        alike = [own for other, own in records if other.stage.name == step.stage.name]
        last = (record or (alike[-1] if alike else {})).get("run", {})
        rows.append(Row(label=label(step), state=state, cost=cost, asks=step.calls is not None, last=last))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, with a line of sums."""
    head = ("stage", "state", "model calls", "tokens in, about", "tokens out, at most", "time, about")
    lines = [head, *(_cells(row) for row in rows), _sums(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = []
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        padded += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text)


def says_stop(path: str) -> bool:
    """A file that is empty, or begins with the word "stop", ends its loop."""
    try:
        with open(path, "rb") as file:
            begin = file.read(64)
    except OSError:
        return False
    return not begin or begin.split()[:1] == [b"stop"]


def count_samples(path: str) -> tuple[collections.Counter[str], int | None]:
    """Samples of each id in a file, and the tokens of all (None: a row has no count); no file: none."""
    counts: collections.Counter[str] = collections.Counter()
    tokens: int | None = 0
    for row in _readable(path):
        counts[str(row.get("id"))] += 1
        own = row.get("completion_tokens")
        tokens = tokens + own if isinstance(own, int) and tokens is not None else None
    return counts, tokens


def samples_path(step: Step) -> str:
    """Where the samples of a stage with calls go."""
    assert step.calls is not None
    return step.calls.samples or step.outputs[0]


def _prompts_known(step: Step, made: Mapping[str, Step], waiting: set[str]) -> bool:
    if step.calls is None or not os.path.isfile(step.calls.prompts):
        return False
    return not any(by.key in waiting for by in makers(made, step.calls.prompts))


def _cost(
    step: Step, records: Sequence[tuple[Step, Record]], record: Record | None, *, known: bool, goes_on: bool
) -> Cost:
    if step.calls is None:
        return Cost(seconds=_seconds_before(step, records, record))
    if not known:
        return Cost(calls=None, tokens_in=None, tokens_out=None, seconds=None)
    there = count_samples(samples_path(step))[0] if goes_on else collections.Counter()
    calls, tokens_in, tokens_out = _count(step.calls, there)
    rate = _tokens_per_s(step, records, record)
    seconds = None if tokens_out is None or rate is None else tokens_out / rate
    return Cost(calls=calls, tokens_in=tokens_in, tokens_out=tokens_out, seconds=seconds)


def _count(calls: Calls, there: collections.Counter[str]) -> tuple[int, int, int | None]:
    """(calls, tokens in, tokens out at most) without what is there."""
    asked = read = 0
    most: int | None = 0
    name = os.path.basename(calls.prompts)
    for line, row in _numbered(calls.prompts):
        settings = row.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        n, longest = _own(settings, "n", calls.n), _own(settings, "max_tokens", calls.max_tokens)
        missing = max(0, (n or 0) - there[str(row.get("id", f"{name}:{line}"))])
        asked += missing
        read += missing * (_prompt_bytes(row) // BYTES_PER_TOKEN)
        most = None if most is None or longest is None else most + missing * longest
    return asked, read, most


def _own(settings: Mapping[str, Any], name: str, common: str | None) -> int | None:
    value = settings.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return None if common is None else int(common)


def _prompt_bytes(row: Mapping[str, Any]) -> int:
    prompt = row.get("prompt", row.get("messages", ""))
    texts = [own.get("content") for own in prompt if isinstance(own, dict)] if isinstance(prompt, list) else [prompt]
    return sum(len(text.encode(errors="replace")) for text in texts if isinstance(text, str))


def _numbered(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for line, row in iter_jsonl(path):
            if isinstance(row, dict):
                yield line, row
    except UserError as error:
        if os.path.getsize(path):
            raise UserError(f"plan: {error}") from error


def _readable(path: str) -> Iterator[dict[str, Any]]:
    """Rows of a file that may end in a torn one."""
    try:
        with open(path, "rb") as file:
            for raw in file:
                try:
                    row = json.loads(raw)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    yield row
    except OSError:
        return


def _tokens_per_s(step: Step, records: Sequence[tuple[Step, Record]], record: Record | None) -> float | None:
    """The latest measurement of what is most like this step."""
    own = [(step, record)] if record else []
    rates = [(other, other_record["run"]) for other, other_record in [*records, *own] if _rate(other_record)]
    model = masked(step.calls.model or "") if step.calls else ""
    alike: tuple[Callable[[Step, Any], bool], ...] = (
        lambda other, run: other.stage.name == step.stage.name,
        lambda other, run: bool(model) and run.get("model") == model,
        lambda other, run: True,
    )
    for is_alike in alike:
        found = [float(run["tokens_per_s"]) for other, run in rates if is_alike(other, run)]
        if found:
            return found[-1]
    return None


def _rate(record: Record) -> bool:
    run = record.get("run")
    return isinstance(run, dict) and bool(run.get("tokens_per_s"))


def _seconds_before(step: Step, records: Sequence[tuple[Step, Record]], record: Record | None) -> float | None:
    """What this stage took, in this turn or the one before; of a run from its start."""
    own = [(step, record)] if record else []
    runs = [
        other_record.get("run", {}) for other, other_record in [*records, *own] if other.stage.name == step.stage.name
    ]
    found = [float(run["seconds"]) for run in runs if run.get("seconds") is not None and not run.get("resumed")]
    return found[-1] if found else None


def _cells(row: Row) -> tuple[str, ...]:
    if row.state in ("done", "passed over"):
        return row.label, row.state, "-", "-", "-", "-"
    if not row.asks:
        return row.label, row.state, "-", "-", "-", _time(row.cost.seconds)
    cost, last = row.cost, row.last
    calls = _number(cost.calls) + _before(cost.calls, last.get("calls"))
    out = _number(cost.tokens_out) + _before(cost.tokens_out, last.get("completion_tokens"))
    seconds = _time(cost.seconds)
    if cost.seconds is None and last.get("seconds") is not None and not last.get("resumed"):
        seconds += f" (last {_time(last['seconds'])})"
    return row.label, row.state, calls, _number(cost.tokens_in), out, seconds


def _before(value: int | None, last: Any) -> str:
    return f" (last {last:,})" if value is None and isinstance(last, int) else ""


def _sums(rows: Sequence[Row]) -> tuple[str, ...]:
    def total(name: str, show: Callable[[Any], str]) -> str:
        values = [getattr(row.cost, name) for row in rows]
        known = sum(value for value in values if value is not None)
        return show(known) + (" + ?" if None in values else "")

    done = sum(row.state == "done" for row in rows)
    numbers = [total(name, _number) for name in ("calls", "tokens_in", "tokens_out")]
    return ("all", f"{done} of {len(rows)} done", *numbers, total("seconds", _time))


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"
