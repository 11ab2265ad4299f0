"""Rows of the user's file as a task's items: prompt, options, right answer, subject; checked, with file and line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl
from data_tools.placeholders import fill
from data_tools.questions import code_task
from data_tools.schema import Message, Text
from data_tools.verify_code import CodeTask
from data_tools.verify_number import parse_number
from data_tools.verify_option import verify_option
from eval.few_shot import with_examples
from eval.task import WITH_OPTIONS, Task

NO_SUBJECT = "all"
"""The subject of items that have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One checked row.

    prompt: a string (plain text) or messages. completions: texts to be scored, one an option, or one of perplexity.
    gold: the right option's label or the right number, as text. code: the tests of a programming task.
    values: what placeholders stand for, for prompts that are made later.
    """

    id: str
    subject: str
    line: int
    prompt: Text
    options: Mapping[str, str]
    gold: str | None
    completions: tuple[str, ...] = ()
    code: CodeTask | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


def read_items(task: Task, path: str | Path, *, limit: int | None = None) -> list[Item]:
    """The first `limit` rows (all of them: None) as items, behind the task's examples if it has some.

    Not for preference, whose rows are pairs. Raises DataErrors with up to 20 faults, each with file and line.
    """
    items = _read(task, path, limit)
    return items if task.prompt.few_shot is None else _with_shots(task, items, task.prompt.few_shot)


def _read(task: Task, path: str | Path, limit: int | None = None) -> list[Item]:
    seen: dict[str, int] = {}

    def check(row: tuple[int, object]) -> Item:
        line, value = row
        item = _item(task, value, path, line)
        if (first := seen.setdefault(item.id, line)) != line:
            raise DataError(path, line, field=task.fields.id, problem=f"'{item.id}' already stands in line {first}")
        return item

    return check_each(islice(iter_jsonl(path), limit), check)


def _with_shots(task: Task, items: Sequence[Item], path: str) -> list[Item]:
    """The items behind the first `shots` rows of a file that do not ask the same. Raises UserError."""
    rows = [(_asked(row), (row.prompt, _shown(task, row, path))) for row in _read(task, path)]
    found = []
    for item in items:
        own = _asked(item)
        examples = list(islice((example for asked, example in rows if asked != own), task.prompt.shots))
        if len(examples) < (task.prompt.shots or 1):
            problem = (
                f"has {len(examples)} examples for id '{item.id}', prompt.shots is {task.prompt.shots or 'not set'}"
            )
            raise UserError(f"{path}: {problem}; an item is never an example of its own")
        found.append(replace(item, prompt=with_examples(item.prompt, examples, task.prompt.api)))
    return found


def _asked(item: Item) -> tuple[str, ...]:
    """Equal for two rows that ask the same: spaces and the order of options do not count."""
    question = item.values.get("question")
    if not isinstance(question, str):
        question = item.prompt if isinstance(item.prompt, str) else item.prompt[-1].content
    return (" ".join(question.split()), *sorted(" ".join(text.split()) for text in item.options.values()))


def _shown(task: Task, row: Item, path: str) -> str:
    """What an example answers."""
    if task.kind == "perplexity":
        return row.completions[0]
    if task.kind == "choice_logprob":
        return row.completions[list(row.options).index(str(row.gold))]
    own = {"gold": row.gold, "gold_text": row.options.get(str(row.gold))}
    return _filled(task.prompt.shot, {**row.values, **own}, path, row.line)


def subject_of(row: Mapping[str, Any], task: Task) -> str:
    """The row's subject as text."""
    found = row.get(task.fields.subject)
    return NO_SUBJECT if found is None else str(found)


def _item(task: Task, row: object, path: str | Path, line: int) -> Item:
    if not isinstance(row, dict):
        raise DataError(path, line, field=None, problem=f"expected an object, got {type(row).__name__}")
    name = row.get(task.fields.id, f"{Path(path).name}:{line}")
    if isinstance(name, bool) or not isinstance(name, str | int):
        problem = f"expected a string or a number, got {type(name).__name__}"
        raise DataError(path, line, field=task.fields.id, problem=problem)
    shown = task.kind in WITH_OPTIONS or (task.kind == "free" and row.get(task.fields.options) is not None)
    named = _options(task, row, path, line) if shown else {}
    options = named if task.kind in WITH_OPTIONS else {}
    values = _values(task, row, named)
    return Item(
        id=str(name),
        subject=subject_of(row, task),
        line=line,
        prompt=_prompt(task, values, path, line),
        options=options,
        gold=_gold(task, row, options, path, line),
        completions=_completions(task, values, options, path, line),
        code=_code(row, str(name), path, line) if task.kind == "code" else None,
        values=values,
    )


def _options(task: Task, row: Mapping[str, Any], path: str | Path, line: int) -> dict[str, str]:
    given, field = row.get(task.fields.options), task.fields.options
    if isinstance(given, list):
        given = {chr(ord("A") + index): text for index, text in enumerate(given)}
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        problem = f"expected an object of texts or a list of texts, got {type(row.get(field)).__name__}"
        raise DataError(path, line, field=field, problem=problem)
    return given


def _values(task: Task, row: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    """What placeholders stand for: columns, then the names that a task gives them."""
    lines = [fill(task.prompt.option, {"label": label, "text": text}) for label, text in options.items()]
    named = {"options": "\n".join(lines), "labels": ", ".join(options)} if options else {}
    if (right := str(row.get(task.fields.answer))) in options:
        named["gold_text"] = options[right]
    question = {"question": row[task.fields.question]} if task.fields.question in row else {}
    tests = row.get("test_list", row.get("tests"))
    if isinstance(tests, list):
        named["tests"] = "\n".join(map(str, tests))
    return {**row, **question, **named}


def _filled(text: str, values: Mapping[str, Any], path: str | Path, line: int) -> str:
    try:
        return fill(text, values)
    except KeyError as error:
        problem = "the prompt asks for it; it is missing, null or no plain value"
        raise DataError(path, line, field=str(error.args[0]), problem=problem) from None


def _prompt(task: Task, values: Mapping[str, Any], path: str | Path, line: int) -> Text:
    text = _filled(task.prompt.text, values, path, line)
    if task.prompt.api == "completions":
        return text
    system = [] if task.prompt.system is None else [Message("system", _filled(task.prompt.system, values, path, line))]
    return (*system, Message("user", text))


def _gold(task: Task, row: Mapping[str, Any], options: Mapping[str, str], path: str | Path, line: int) -> str | None:
    field = task.fields.answer
    if task.kind in ("code", "perplexity"):
        return None
    given = row.get(field)
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise DataError(path, line, field=field, problem=f"expected the right answer, got {type(given).__name__}")
    gold = str(given).strip()
    if task.kind == "numeric" and parse_number(gold) is None:
        raise DataError(path, line, field=field, problem=f"'{gold}' is no number")
    if options:
        if gold not in options:
            problem = f"'{gold}' is no label of the options ({', '.join(options)})"
            raise DataError(path, line, field=field, problem=problem)
        try:
            verify_option("", gold, options)
        except UserError as error:
            raise DataError(path, line, field=task.fields.options, problem=str(error)) from None
    return gold


def _completions(
    task: Task, values: Mapping[str, Any], options: Mapping[str, str], path: str | Path, line: int
) -> tuple[str, ...]:
    if task.kind == "perplexity":
        return (_filled(task.prompt.completion, values, path, line),)
    if task.kind != "choice_logprob":
        return ()
    own = [{**values, "label": label, "text": text} for label, text in options.items()]
    return tuple(_filled(task.prompt.completion, each, path, line) for each in own)


def _code(row: Mapping[str, Any], name: str, path: str | Path, line: int) -> CodeTask:
    try:
        return code_task(row, name)
    except UserError as error:
        raise DataError(path, line, field=None, problem=str(error)) from None
