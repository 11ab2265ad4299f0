"""Does a prompt, or a critique, give the right answer away? Needs the questions (`data_tools.questions`).

A prompt leaks where a sentence of it states the answer: "the answer is B", "Hint: aspirin", "#### 18", a line that is
the label alone, or the right option's line alone has a mark of its own. That the question holds the options, or the
right number among others, is no leak. A sentence that stands in the prompts of several questions is one only where its
answer is right for most of them: the example "finish with: the answer is A" tells nothing.

A critique leaks where it states the answer or names it: an option as `data_tools.pairs.leaks` has it, which builders
use too; the right number, unless the question has it too (one digit: only where it is stated).

Rules only: a leak in other words ("the drug from willow bark") is not found.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, check_each
from data_tools.jsonl import iter_jsonl
from data_tools.lint_checks import Check, share_check
from data_tools.lint_rows import PairRow, asked_of, folded
from data_tools.pairs.leaks import leak_of
from data_tools.questions import Question, id_of, question_id
from data_tools.verify_number import NUMBER, parse_number, verify_number
from data_tools.verify_option import choose
from data_tools.verify_option_read import Options, read_options
from data_tools.verify_text import denied, normalise

PURE = 0.8
"""A sentence of several prompts leaks where its answer is right for at least so many of their questions."""
FIRST = 30
"""Questions that a sentence of many is tried on before it is tried on all."""
SENTENCES = re.compile(r"(?<=[.!?。！？；])\s+|(?<=[。！？；])")
"""Ends of sentences within a line."""
LEAD = re.compile(
    r"answer|correct|right (?:option|choice|one)|solution|result|boxed|####"
    r"|\b(?:gold|key|hint|label|target|truth|reference)\b"
    r"|پاسخ|جواب|صحیح|درست|راهنمایی|کلید|نتیجه|الاجاب|الصحیح|答案|正确|提示|结果|故选|应选|答[:：]",
    re.IGNORECASE,
)
"""Only sentences with one of these can state an answer; the rest are not read further."""
HINT = re.compile(
    r"^\W*(?:(?:the )?(?:gold|key|hint|label|target|ground[- ]truth|reference)(?: (?:answer|label|option|solution))?"
    r"|راهنمایی|کلید(?: پاسخ)?|提示|参考答案|标准答案)\s*(?:[:=]|is\b|است)\s*",
    re.IGNORECASE,
)
CRITIQUE_FIELDS = ("critique", "text", "response")


@dataclass(frozen=True)
class _Asked:
    """A question; its options in the form in which texts are searched are made when they are needed."""

    question: Question

    @cached_property
    def options(self) -> Options | None:
        return read_options(self.question.options) if self.question.kind == "option" else None

    @property
    def right(self) -> int:
        return list(self.question.options).index(str(self.question.gold))


class Leaks:
    """The questions, ready to be looked up."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.by_id = {own.id: _Asked(own) for own in questions}
        self.by_text = {folded(str(own.values["question"])): own.id for own in questions}

    def of(self, row: PairRow) -> Question | None:
        """The question that the pair is of."""
        name = asked_of(row, self.by_id, self.by_text)
        return None if name is None else self.by_id[name].question

    def prompts(self, rows: Sequence[PairRow], limit: float) -> Check:
        """Prompts that state the answer; limit: the share above which they are refused."""
        asked = {row.id: self.by_id[own.id] for row in rows if (own := self.of(row)) is not None}
        why: dict[str, str] = {}
        holders: dict[str, dict[str, str]] = defaultdict(dict)  # sentence to row to question
        for row in rows:
            if own := asked.get(row.id):
                if mark := _marked(row.asked, own):
                    why[row.id] = mark
                for sentence in _candidates(row.asked, own):
                    holders[sentence][row.id] = own.question.id
        for sentence, held in holders.items():
            for name in self._given_away(sentence, held):
                why.setdefault(name, sentence)
        found = [row.id for row in rows if row.id in why]
        return share_check(
            "leak",
            found,
            len(asked),
            "prompts with a known question state its answer",
            limit=limit,
            remedy="take the answer out of the prompt",
            more={"why": {name: why[name][:200] for name in found[:20]}, "no_question": len(rows) - len(asked)},
        )

    def _given_away(self, sentence: str, held: Mapping[str, str]) -> list[str]:
        """The rows whose answer the sentence states; none where it states the wrong one of too many questions."""
        questions = list(dict.fromkeys(held.values()))
        first = questions[:: max(1, len(questions) // FIRST)]  # a sentence that all have is told by some
        if sum(_states(sentence, self.by_id[name]) for name in first) < PURE * len(first):
            return []
        right = {name for name in questions if _states(sentence, self.by_id[name])}
        return [row for row, name in held.items() if name in right] if len(right) >= PURE * len(questions) else []

    def critiques(self, path: str | Path, limit: float) -> Check:
        """Critiques of a file (rows with id and critique, text or response) that state or name the answer."""
        read = self._read_critiques(path)
        why = {f"{name}:{line}": reason for name, line, reason in read if reason}
        stated = sum(reason.startswith("states") for reason in why.values())
        return share_check(
            "critique",
            [name for name, _, reason in read if reason],
            len(read),
            f"critiques of {Path(path).name} give the answer away ({stated} state it, {len(why) - stated} name it)",
            limit=limit,
            remedy="drop them, or have them written anew",
            more={"why": {name: why[name][:200] for name in list(why)[:20]}},
        )

    def _read_critiques(self, path: str | Path) -> list[tuple[str, int, str]]:
        """(id, line, why it leaks or "") of every row. Raises DataErrors."""

        def check(item: tuple[int, object]) -> tuple[str, int, str]:
            line, row = item
            if not isinstance(row, dict):
                raise DataError(path, line, field=None, problem=f"expected an object, got {type(row).__name__}")
            name = id_of(row, path, line)
            asked_id = question_id(name, self.by_id)
            if asked_id is None:
                raise DataError(path, line, field="id", problem=f"'{name}' is of no question of the questions file")
            return name, line, _leak_of_critique(_critique_text(row, path, line), self.by_id[asked_id])

        return check_each(iter_jsonl(path), check)


def _leak_of_critique(text: str, asked: _Asked) -> str:
    """How the critique gives the answer away, "" where it does not."""
    for sentence in _candidates(text, asked):
        if _states(sentence, asked):
            return f"states the answer: {sentence}"
    if asked.question.kind == "number":
        return _named_number(normalise(text), asked)
    found = leak_of(text, asked.question)
    return f"names {found}" if found else ""


def _critique_text(row: Mapping[str, Any], path: str | Path, line: int) -> str:
    for name in CRITIQUE_FIELDS:
        if isinstance(row.get(name), str):
            return row[name]
    raise DataError(path, line, field="critique", problem=f"missing: one of {', '.join(CRITIQUE_FIELDS)} as a text")


def _candidates(text: str, asked: _Asked) -> Iterator[str]:
    """Sentences that could state an answer: with a word like "answer", or nothing but a label; no option's own line."""
    options = asked.question.options
    own_lines = {_bare(f"{label}{text}") for label, text in options.items()} | {
        _bare(text) for text in options.values()
    }
    for line in text.splitlines():
        if _bare(line) in own_lines and not HINT.match(line):
            continue
        for sentence in SENTENCES.split(line):
            if LEAD.search(sentence) or sentence.strip(" \t*_()[].:\"'") in options:
                yield sentence.strip()


def _bare(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def _states(sentence: str, asked: _Asked) -> bool:
    """Whether the sentence states the right answer."""
    spelt = normalise(sentence)
    hint = HINT.match(spelt)
    if hint:
        spelt = f"answer: {spelt[hint.end() :]}"
    if asked.options is not None:
        reading, why = choose(spelt.replace("$", ""), asked.options)
        told = why.startswith(("statement", "a line"))
        return told and reading is not None and reading.kind == "option" and reading.index == asked.right
    if asked.question.kind != "number":
        return False
    verdict = verify_number(spelt, str(asked.question.gold))
    return verdict.verdict == "correct" and verdict.why.startswith("statement")


def _marked(text: str, asked: _Asked) -> str:
    """The right option's line, where it alone of the options' lines looks different from the others."""
    options = asked.question.options
    around: dict[str, tuple[str, str]] = {}
    for line in text.splitlines() if options else ():
        for label, own in options.items():
            frame = _frame(line.strip(), label, own.strip())
            if frame is not None:
                if around.setdefault(label, frame) != frame:
                    return ""  # listed twice, as in an example of the format: no list to compare
                break
    right = around.get(str(asked.question.gold))
    others = {frame for label, frame in around.items() if label != asked.question.gold}
    if right is None or len(around) < max(3, len(options)) or len(others) != 1 or right in others:
        return ""
    return f"marks the right option: {' '.join(right)}"


def _frame(line: str, label: str, text: str) -> tuple[str, str] | None:
    """What stands before and after an option's label and text in its line; None where the line is another."""
    end = line.rfind(text) if text else -1
    start = line.find(label, 0, max(0, end))
    if start < 0:
        return None
    before, between, after = line[:start], line[start + len(label) : end], line[end + len(text) :]
    if len(before) > 12 or len(after) > 30 or not 1 <= len(between) <= 6 or any(map(str.isalnum, between)):
        return None
    return before.strip() + between.strip(), after.strip(" .。\t")


def _named_number(spelt: str, asked: _Asked) -> str:
    gold = parse_number(str(asked.question.gold))
    assert gold is not None  # read_questions checked it
    if abs(gold.value) < 10 and gold.value.denominator == 1:
        return ""
    if gold.value in set(_values(normalise(str(asked.question.values["question"])))):
        return ""
    for match in NUMBER.finditer(spelt):
        number = parse_number(match.group())
        if number is not None and number.value == gold.value and not denied(spelt, match.start()):
            return f"names the right number ({match.group().strip()})"
    return ""


def _values(text: str) -> Iterable[Any]:
    return (number.value for match in NUMBER.finditer(text) if (number := parse_number(match.group())) is not None)
