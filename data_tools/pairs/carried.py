"""What builders that ask for a second text share: the first answer, carried in the request for the second.

The request's row holds the first answer whole, in the column `student`, so that the step that builds pairs needs the
request and what came back, and no file of an earlier stage that may have changed since:

    {"id": "q7#0#t", "prompt": [...], "question_id": "q7",
     "student": {"id": "q7", "sample": 0, "prompt": [...], "text": "...", "verdict": "wrong", "made_by": {...}}}

Nothing is asked and nothing is judged here.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.command import positive
from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl
from data_tools.pairs.exchange import Answer, prompt_json
from data_tools.pairs.record import made_by
from data_tools.questions import KINDS, Question, question_id, read_questions
from data_tools.schema import Text, check_prompt

CUT = "cut off"
"""Why an answer is dropped that its sampler ended: no one should learn to write half of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstAnswer:
    """The student's answer. id, sample: of its own request. verdict: None where nobody judged it."""

    id: str
    sample: int
    prompt: Text
    text: str
    verdict: str | None
    made_by: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its own in the file: what ids of further requests and of pairs begin with."""
        return f"{self.id}#{self.sample}"

    def row(self) -> dict[str, Any]:
        """As the column of a request."""
        return {
            "id": self.id,
            "sample": self.sample,
            "prompt": prompt_json(self.prompt),
            "text": self.text,
            "verdict": self.verdict,
            "made_by": dict(self.made_by),
        }


@dataclass(frozen=True, slots=True)
class Carried:
    """A row of requests with the first answer in it; row: all its columns."""

    id: str
    question_id: str
    student: FirstAnswer
    row: Mapping[str, Any]


def first_of(answer: Answer) -> FirstAnswer:
    """A sample with its verdict, to be carried."""
    sample = answer.sample
    return FirstAnswer(
        id=answer.id,
        sample=sample.sample,
        prompt=answer.prompt,
        text=answer.prefix + sample.text,
        verdict=answer.verdict,
        made_by=made_by(sample),
    )


def read_carried(path: str) -> dict[str, Carried]:
    """Every row of requests that an earlier step of a builder wrote, by id. Raises DataErrors for other files."""

    def check(row: tuple[int, object]) -> Carried:
        line, value = row
        student = value.get("student") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(student, dict):
            problem = "missing: these are no requests that this command's own earlier step wrote"
            raise DataError(path, line, field="student", problem=problem)
        if not isinstance(value.get("id"), str) or not isinstance(value.get("question_id"), str):
            raise DataError(path, line, field="question_id", problem="is missing, or the row has no id")
        return Carried(value["id"], value["question_id"], first_from(student, path, line, "student"), value)

    rows: list[Carried] = check_each(iter_jsonl(path, may_be_empty=True), check)
    return {carried.id: carried for carried in rows}


def first_from(column: Mapping[str, Any], path: str, line: int | None, field: str) -> FirstAnswer:
    """An answer as a request carries it. Raises DataError."""
    wanted = {"id": str, "sample": int, "text": str, "made_by": dict}
    for name, kind in wanted.items():
        if not isinstance(column.get(name), kind):
            raise DataError(path, line, field=f"{field}.{name}", problem="is missing or of another kind")
    prompt = check_prompt({"prompt": column.get("prompt")}, path=path, line=line or 0).prompt
    return FirstAnswer(prompt=prompt, verdict=column.get("verdict"), **{name: column[name] for name in wanted})


def read_by_id(args: argparse.Namespace) -> dict[str, Question]:
    """The questions of `--questions`, by id; none of a file of no bytes, as a step writes it that kept none."""
    questions = read_questions(args.questions, args.kind, option_line=args.option_line, may_be_empty=True)
    return {own.id: own for own in questions}


def with_questions(
    answers: Iterable[Answer], questions: Mapping[str, Question], requests: str
) -> Iterator[tuple[Answer, Question]]:
    """Each answer with what it answers. Raises UserError for one that answers no known question."""
    for answer in answers:
        name = question_id(answer.id, questions)
        if name is None:
            raise UserError(f"{requests}: id '{answer.id}' belongs to no question of the questions file")
        yield answer, questions[name]


def values_of(question: Question, **more: Any) -> dict[str, Any]:
    """What a prompt's placeholders stand for: the question's columns, `more`, and no text where an answer is not known
    (`gold`, `gold_text`, `explanation`)."""
    known = {name: value for name, value in question.values.items() if value is not None}
    return {"gold": "", "gold_text": "", "explanation": "", **known, "id": question.id, **more}


def wrong_answers(
    answers: Iterable[tuple[Answer, Question]], *, invalid: str, per_question: int, dropped: Counter[str]
) -> Iterator[tuple[FirstAnswer, Question]]:
    """The answers that are wrong, in order, at most `per_question` of a question; the others are counted by reason.

    invalid: "wrong" takes answers that could not be read for wrong ones, "drop" leaves them out.
    """
    taken: Counter[str] = Counter()
    for answer, question in answers:
        if answer.verdict == "correct":
            dropped["correct"] += 1
        elif answer.verdict == "invalid" and invalid == "drop":
            dropped["invalid"] += 1
        elif not answer.sample.text.strip():
            dropped["empty"] += 1
        elif taken[question.id] == per_question:
            dropped["over --per-question"] += 1
        else:
            taken[question.id] += 1
            yield first_of(answer), question


def add_questions(parser: argparse.ArgumentParser) -> None:
    """`--questions`, `--kind`, `--option-line`."""
    parser.add_argument("--questions", required=True, help="JSON Lines of questions with answers")
    parser.add_argument("--kind", required=True, choices=KINDS, help="what the answers are")
    parser.add_argument(
        "--option-line", default="{label}. {text}", help="a line of {options} (default '{label}. {text}')"
    )


def add_files(parser: argparse.ArgumentParser, *, verdicts: bool | None, whose: str) -> None:
    """`--requests`, `--samples`, `--verdicts` (needed or not; None: there is no such option) and `--out`."""
    parser.add_argument("--requests", required=True, help=f"JSON Lines of prompts that {whose} answered")
    parser.add_argument("--samples", required=True, help=f"JSON Lines of {whose}'s samples")
    if verdicts is not None:
        parser.add_argument("--verdicts", required=verdicts, help="JSON Lines of verdicts on these samples")
    parser.add_argument("--out", required=True, help="JSON Lines, written anew and whole")


def add_choice_of_wrong(parser: argparse.ArgumentParser) -> None:
    """`--invalid`, `--per-question`."""
    parser.add_argument(
        "--invalid",
        choices=["wrong", "drop"],
        default="wrong",
        help="an answer that could not be read is taken for a wrong one (default), or left out",
    )
    parser.add_argument(
        "--per-question", type=positive, default=1, help="wrong answers of a question that are used (default 1)"
    )
