"""Rows of process rewards: an answer in steps, and how right each step is.

    {"id": "q1#0", "prompt": "..." or messages, "steps": ["First, ...\\n", "So ..."],
     "hard": [1, 0], "soft": [0.75, 0.0], "correct": false}

steps    the answer, cut into steps that join to it without anything between; none is blank
hard     0 or 1 a step: can a right answer still be reached from here?
soft     0 to 1 a step, optional: the share of completions that reached it
correct  true or false, optional: is the whole answer right?

Checked here, used by `schema.check_record`; tokens are the business of `encode`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

UNKNOWN = math.nan
"""A label that a row does not give."""


class StepLabel(NamedTuple):
    """What is known of one step, 0 to 1 each; NaN where nothing is. `outcome` is 1 at every step of a right answer, 0
    of a wrong one; `final` is the same at the last step alone."""

    hard: float = UNKNOWN
    soft: float = UNKNOWN
    outcome: float = UNKNOWN
    final: float = UNKNOWN


@dataclass(frozen=True, slots=True)
class LabelledSteps:
    """The steps of one completion. ends: (n,) characters up to each step's end; the last is the text's length."""

    ends: tuple[int, ...]
    labels: tuple[StepLabel, ...]


class FieldProblem(Exception):
    """A field and what is wrong with it; who knows file and line adds the place."""

    def __init__(self, field: str | None, problem: str) -> None:
        self.field, self.problem = field, problem
        super().__init__(problem)


def unlabelled(steps: Sequence[str]) -> LabelledSteps:
    """Steps of which nothing is known, for scoring."""
    return LabelledSteps(_ends(steps), (StepLabel(),) * len(steps))


def read_steps(row: Mapping[str, object]) -> tuple[str, LabelledSteps]:
    """The answer and its steps with labels. Raises FieldProblem for the first thing that is wrong."""
    steps = _texts(row.get("steps"))
    count = len(steps)
    hard = [_hard(value, place) for place, value in _values(row, "hard", count)]
    soft = [UNKNOWN] * count
    if row.get("soft") is not None:
        soft = [_share(value, place) for place, value in _values(row, "soft", count)]
    outcome = UNKNOWN
    if row.get("correct") is not None:
        if not isinstance(row["correct"], bool):
            raise FieldProblem("correct", f"expected true or false, got {row['correct']!r}")
        outcome = float(row["correct"])
    final = [UNKNOWN] * (count - 1) + [outcome]
    labels = [StepLabel(h, s, outcome, f) for h, s, f in zip(hard, soft, final, strict=True)]
    return "".join(steps), LabelledSteps(_ends(steps), tuple(labels))


def _texts(value: object) -> list[str]:
    if not isinstance(value, list) or not value:
        found = "missing" if value is None else "an empty list" if value == [] else repr(value)[:40]
        raise FieldProblem("steps", f'expected a list of texts like ["First, ...", "So ..."], got {found}')
    texts: list[str] = []
    for k, text in enumerate(value):
        place = f"steps[{k}]"
        if not isinstance(text, str):
            raise FieldProblem(place, f"expected a text, got {text!r:.40}")
        if not text.strip():
            raise FieldProblem(place, "is blank: join it to the step before, a step is read at its last token")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as wrong:
            raise FieldProblem(place, f"half of a surrogate pair at character {wrong.start}: not text") from None
        texts.append(text)
    return texts


def _ends(steps: Sequence[str]) -> tuple[int, ...]:
    return tuple(accumulate(map(len, steps)))


def _values(row: Mapping[str, object], field: str, count: int) -> list[tuple[str, object]]:
    """(place, value) of a list that has one value a step."""
    values = row.get(field)
    if not isinstance(values, list):
        raise FieldProblem(
            field, "missing: one value a step" if values is None else "expected a list, one value a step"
        )
    if len(values) != count:
        raise FieldProblem(field, f"has {len(values)} values for {count} steps")
    return [(f"{field}[{k}]", value) for k, value in enumerate(values)]


def _hard(value: object, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise FieldProblem(place, f"must be 0 or 1, got {value!r:.40}")
    return float(value)


def _share(value: object, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise FieldProblem(place, f"must be a number from 0 to 1, got {value!r:.40}")
    return float(value)
