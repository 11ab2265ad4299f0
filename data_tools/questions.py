"""Questions with a known answer, as verifiers and pair builders read them: one checked row of JSON Lines each.

    option   question, options (label to text, or a list of texts: labels A, B, ...; 2 to 10), gold or answer (a label)
    number   question, gold, final_answer or answer (a number)
    code     a row of HumanEval (prompt, entry_point, test) or MBPP (text, test_list), or prompt and `tests`
    free     question, and gold, reference or answer if there is one: a model judges it, no rule does

`id` (or `task_id`) is the question's name. What is made of a question bears its id and, after a "#", what tells it from
others of the same question: `q7`, `q7#3`, `q7#3#1`. Not here: how an answer is judged (`verify_*`).
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl
from data_tools.verify_code import CodeTask, humaneval_task, mbpp_task, plain_task, verify_code
from data_tools.verify_number import DEFAULT_REL_TOL, parse_number, verify_number
from data_tools.verify_option import verify_option
from data_tools.verify_result import Verdict

Kind = Literal["option", "number", "code", "free"]
KINDS: tuple[Kind, ...] = ("option", "number", "code", "free")
RULE_KINDS: tuple[Kind, ...] = ("option", "number", "code")
"""Kinds that a rule can judge."""

GOLD_FIELDS = {
    "option": ("gold", "answer"),
    "number": ("gold", "final_answer", "answer"),
    "free": ("gold", "reference", "answer"),
}

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One checked row. gold: the right option's label, the right number, or a reference answer, as text.

    values: what the placeholders of prompts stand for: the row's columns, `question`, and where there are options
    `options` (a line each), `labels` and `gold_text` (the right option's text).
    """

    id: str
    kind: Kind
    options: Mapping[str, str]
    gold: str | None
    code: CodeTask | None
    values: Mapping[str, Any] = field(default_factory=dict)
    path: str
    line: int


def read_questions(
    path: str | Path, kind: Kind, *, option_line: str = "{label}. {text}", may_be_empty: bool = False
) -> list[Question]:
    """Every row of a file, checked; an id may stand once. option_line: a line of `{options}`. may_be_empty: a file of
    no bytes has no questions.

    Raises DataErrors with up to 20 faults, each with file and line.
    """
    seen: dict[str, int] = {}

    def check(row: tuple[int, object]) -> Question:
        line, value = row
        if not isinstance(value, dict):
            raise DataError(path, line, field=None, problem=f"expected an object, got {type(value).__name__}")
        name = id_of(value, path, line)
        if (first := seen.setdefault(name, line)) != line:
            raise DataError(path, line, field="id", problem=f"'{name}' already stands in line {first}")
        try:
            return _question(name, kind, value, option_line, path, line)
        except UserError as error:
            raise DataError(path, line, field=None, problem=str(error)) from None

    return check_each(iter_jsonl(path, may_be_empty=may_be_empty), check)


def judge(question: Question, text: str, *, rel_tol: float = DEFAULT_REL_TOL) -> Verdict:
    """The rule's verdict on one answer (a program runs in the sandbox). Raises ValueError for kind free."""
    if question.kind == "option":
        return verify_option(text, str(question.gold), question.options)
    if question.kind == "number":
        return verify_number(text, question.gold, rel_tol=rel_tol)
    if question.code is not None:
        return verify_code(text, question.code)
    raise ValueError(f"question '{question.id}' is free: no rule judges it")


def question_id(name: str, known: Container[str]) -> str | None:
    """Whose question `name` is: itself, or what stands before its last, last but one, ... "#"; None: nobody's."""
    while name not in known:
        name, mark, _ = name.rpartition("#")
        if not mark:
            return None
    return name


def id_of(row: Row, path: str | Path, line: int) -> str:
    """`id` or `task_id` as text. Raises DataError."""
    name = row.get("id", row.get("task_id"))
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(path, line, field="id", problem=f"expected a string or a number, got {type(name).__name__}")
    return str(name)


def gold_of(row: Row, kind: str) -> Any:
    """The row's right answer as it stands there. Raises UserError where there is none."""
    for name in GOLD_FIELDS[kind]:
        if row.get(name) is not None:
            return row[name]
    raise UserError(f"field 'gold': missing (or {', '.join(GOLD_FIELDS[kind][1:])})")


def check_asked(row: Row, kind: str) -> None:
    """Raises UserError for a question of kind option or number that cannot be judged."""
    gold = gold_of(row, kind)
    if kind == "number":
        if isinstance(gold, bool) or not isinstance(gold, str | int | float) or parse_number(str(gold)) is None:
            raise UserError(f"gold {gold!r} is no number")
        return
    options = row.get("options")
    if not isinstance(options, dict | list):
        raise UserError(f"field 'options': expected an object or a list, got {type(options).__name__}")
    verify_option("", str(gold), options)


def code_task(row: Row, name: str) -> CodeTask:
    """The tests of a row of kind code. Raises UserError."""
    try:
        if "entry_point" in row and "test" in row:
            return humaneval_task({**row, "task_id": name})
        if "test_list" in row:
            return mbpp_task({**row, "task_id": name})
        if "tests" in row:
            return plain_task(row, name)
    except SyntaxError as error:
        raise UserError(f"the tests of task {name} are no Python: {error.msg}") from None
    except KeyError as error:
        raise UserError(f"field {error}: missing") from None
    raise UserError("has no tests: expected 'tests', 'test_list', or 'test' with 'entry_point'")


def _question(name: str, kind: Kind, row: Row, option_line: str, path: str | Path, line: int) -> Question:
    code, options, gold = None, {}, None
    if kind == "code":
        code = code_task(row, name)
    elif kind != "free":
        check_asked(row, kind)
        gold = str(gold_of(row, kind)).strip()
    elif any(row.get(field) is not None for field in GOLD_FIELDS["free"]):
        gold = str(gold_of(row, kind)).strip()
    values = dict(row)
    text = row.get("question", row.get("text", row.get("prompt")))
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"field 'question': expected a text, got {type(text).__name__ if text != '' else 'nothing'}")
    values["question"] = text
    if kind == "option":
        options = _labelled(row["options"])
        lines = (option_line.replace("{label}", label).replace("{text}", own) for label, own in options.items())
        values |= {"options": "\n".join(lines), "labels": ", ".join(options), "gold_text": options[str(gold)]}
    if isinstance(row.get("test_list"), list):
        values["tests"] = "\n".join(map(str, row["test_list"]))
    values["gold"] = gold
    return Question(id=name, kind=kind, options=options, gold=gold, code=code, values=values, path=str(path), line=line)


def _labelled(options: Mapping[str, str] | list[str]) -> dict[str, str]:
    if isinstance(options, list):
        return {chr(ord("A") + index): text for index, text in enumerate(options)}
    return dict(options)
