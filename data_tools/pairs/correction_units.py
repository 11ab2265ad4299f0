"""Of an error and its fix, the parts that a pair of `self_correct` sets against each other: its unit.

    trajectory         the whole texts
    answer             only what says the answer: the text after the thinking, in <answer>, or the closing sentence
    first_wrong_step   what follows the steps that both share, the first step that differs and all after it

Nothing is judged here, and what a part holds is the text itself, but for white space at the ends of an answer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from data_tools.errors import DataError
from data_tools.jsonl import iter_jsonl
from data_tools.questions import id_of
from data_tools.steps import ANSWER_LINE, Unit, split_steps
from data_tools.verify_text import ANSWER_TAG, THINK_END, final_part

PairUnit = Literal["trajectory", "answer", "first_wrong_step"]
PAIR_UNITS: tuple[PairUnit, ...] = get_args(PairUnit)


@dataclass(frozen=True, slots=True)
class Parts:
    """shared: the correct steps before both, "" where there are none; chosen, rejected: what follows them."""

    chosen: str
    rejected: str
    shared: str = ""


@dataclass(frozen=True, slots=True)
class WrongStep:
    """The correct steps of an error, as one text, and the step after them, which is wrong."""

    shared: str
    step: str


@dataclass(frozen=True, slots=True)
class StepCut:
    """How texts are cut into steps; pattern: of unit regex."""

    unit: Unit
    pattern: re.Pattern[str] | None = None


def answer_part(text: str, closing: re.Pattern[str] | None) -> str | None:
    """What says the answer, or None. closing: a user's pattern, whose last match begins it; it comes first.

    Else, of a text with thinking or an <answer> tag, what `verify_text.final_part` takes; else the sentences at the end
    that begin as `steps.ANSWER_LINE` says.
    """
    if closing is not None:
        matches = list(closing.finditer(text))
        found: str | None = text[matches[-1].start() :] if matches else None
    elif THINK_END.search(text) or ANSWER_TAG.search(text):
        found = final_part(text)
    else:
        found = split_steps(text, "sentence", answer_line=ANSWER_LINE).rest
    return found.strip() or None if found is not None else None


def after_shared_steps(error: str, fix: str, cut: StepCut) -> Parts | None:
    """The texts behind the steps that both begin with; None where they share none, or one is the other's beginning."""
    wrong, right = (split_steps(text, cut.unit, pattern=cut.pattern).steps for text in (error, fix))
    shared = 0
    while shared < min(len(wrong), len(right)) and wrong[shared] == right[shared]:
        shared += 1
    if shared in (0, len(wrong), len(right)):
        return None
    start = len("".join(wrong[:shared]))
    return Parts(fix[start:], error[start:], error[:start])


def after_wrong_step(error: str, fix: str, shared: str) -> Parts:
    """The error behind its correct steps, and a fix that goes on from them, or repeats them first."""
    rest = fix.lstrip()[len(shared.lstrip()) :] if fix.lstrip().startswith(shared.lstrip()) else fix
    return Parts(rest, error[len(shared) :], shared)


def first_wrong_step(text: str, name: str, labels: Mapping[str, "StepLabels"], cut: StepCut) -> WrongStep | None:
    """Where the error of this name goes wrong by its labels; None where they call all steps right. Raises DataError for
    labels of another text."""
    own = labels[name]
    if 0 not in own.labels:
        return None
    steps = own.steps or split_steps(text, cut.unit, pattern=cut.pattern, answer_line=ANSWER_LINE).steps
    if own.steps is not None and "".join(steps) != text:
        raise DataError(own.path, own.line, field="steps", problem=f"are not those of the answer '{name}'")
    if len(own.labels) != len(steps):
        problem = (
            f"{len(own.labels)} labels for the {len(steps)} steps of the answer '{name}': cut it as they were made"
        )
        raise DataError(own.path, own.line, field="labels", problem=f"{problem}, or give the row its 'steps'")
    at = own.labels.index(0)
    return WrongStep("".join(steps[:at]), steps[at])


@dataclass(frozen=True, slots=True)
class StepLabels:
    """labels: 1 for a right step, 0 for a wrong one. steps: the texts, where the row has them."""

    labels: tuple[int, ...]
    steps: tuple[str, ...] | None
    path: str
    line: int


def read_labels(path: str) -> dict[str, StepLabels]:
    """By `<id>#<sample>`: rows {id, sample, labels}, or those of process rewards {id: "q1#0", steps, hard}. Raises
    DataError."""
    found = {}
    for line, row in iter_jsonl(path, may_be_empty=True):
        if not isinstance(row, dict):
            raise DataError(path, line, field=None, problem=f"expected an object, got {type(row).__name__}")
        name = id_of(row, path, line) + (f"#{row['sample']}" if "sample" in row else "")
        field = "labels" if "labels" in row else "hard"
        labels = row.get(field)
        right = isinstance(labels, list) and all(type(label) is int and label in (0, 1) for label in labels)
        if not isinstance(labels, list) or not right:
            raise DataError(path, line, field=field, problem="expected a list of 0 and 1, one a step")
        steps = row.get("steps")
        if steps is not None and not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
            raise DataError(path, line, field="steps", problem="expected a list of texts")
        found[name] = StepLabels(tuple(labels), None if steps is None else tuple(steps), path, line)
    return found
