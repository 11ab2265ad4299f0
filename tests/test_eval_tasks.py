"""Task files and the items they make of rows: placeholders, options, errors with file, line and key."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import DataErrors
from data_tools.placeholders import fill
from data_tools.schema import Message
from eval.items import NO_SUBJECT, read_items
from eval.task import OWN_TASKS, load_task, parse_task
from trainer.errors import UserError

QUESTION = {"id": "q1", "question": "Which {options}?", "options": {"A": "one", "B": "two {question}"}, "answer": "B"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def task(kind: str = "choice", **sections: Any) -> Any:
    return parse_task({"name": "t", "kind": kind, **sections})


@pytest.mark.parametrize("path", sorted(OWN_TASKS.glob("*.toml")), ids=lambda path: path.stem)
def test_own_tasks_are_whole(path: Path) -> None:
    assert load_task(path.stem) == load_task(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("choice_cot", "medqa"), ("choice_direct", "cmexam"), ("choice_logprob", "medxpertqa"),
        ("choice_letter", "mmlu_med_fa"), ("numeric", "gsm8k"), ("numeric", "mgsm_zh"), ("humaneval", "humaneval"),
        ("mbpp", "mbpp"), ("perplexity", "gsm8k"), ("choice_direct", "medmcqa"), ("choice_letter", "parsinlu_math_fa"),
    ],
)  # fmt: skip
def test_own_tasks_read_published_sets(name: str, data: str, shared_dir: Path) -> None:
    path = shared_dir / "data" / data / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    items = read_items(load_task(name), path)
    assert [item.id for item in items] == [str(row.get("id", row.get("task_id"))) for row in rows]
    for item, row in zip(items, rows, strict=True):
        text = item.prompt if isinstance(item.prompt, str) else item.prompt[-1].content
        assert row.get("question", row.get("text", row.get("prompt"))) in text
        assert item.subject == str(row.get("subject", NO_SUBJECT))
        if item.options:
            assert item.gold == row["answer"] and dict(item.options) == row["options"]


def test_placeholders_are_filled_once() -> None:
    values = {"a": "{b}", "b": 2, "list": [1]}
    assert fill('{a} {b} {{a}} {"answer": "x"} {}', values) == '{b} 2 {a} {"answer": "x"} {}'
    for name in ("c", "list"):
        with pytest.raises(KeyError, match=name):
            fill("{" + name + "}", values)


def test_a_chat_item(tmp_path: Path) -> None:
    prompt = {"system": "Answer in {lang}.", "text": "{question}\n{options}\n({labels})", "option": "({label}) {text}"}
    (item,) = read_items(task(prompt=prompt), write(tmp_path / "d.jsonl", {**QUESTION, "lang": "en", "subject": 3}))
    assert item.prompt == (
        Message("system", "Answer in en."),
        Message("user", "Which {options}?\n(A) one\n(B) two {question}\n(A, B)"),
    )
    assert (item.id, item.subject, item.gold, item.line) == ("q1", "3", "B", 1)


def test_options_as_a_list_and_other_columns(tmp_path: Path) -> None:
    fields = {"id": "key", "question": "q", "options": "choices", "answer": "right", "subject": "field"}
    prompt = {"api": "completions", "text": "{question}", "completion": "{label}={text}"}
    row = {"key": 7, "q": "Why?", "choices": ["x", "y", "z"], "right": "C", "field": "f"}
    (item,) = read_items(task("choice_logprob", fields=fields, prompt=prompt), write(tmp_path / "d.jsonl", row))
    assert (item.id, item.prompt, item.gold, item.subject) == ("7", "Why?", "C", "f")
    assert item.completions == ("A=x", "B=y", "C=z")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": "C"}, "field 'answer': 'C' is no label of the options (A, B)"),
        ({"answer": None}, "field 'answer': expected the right answer, got NoneType"),
        ({"options": "A or B"}, "field 'options': expected an object of texts or a list of texts, got str"),
        ({"options": {"A": "one"}, "answer": "A"}, "field 'options': 1 options: a question needs 2 to 10"),
        ({"question": None}, "field 'question': the prompt asks for it; it is missing, null or no plain value"),
        ({"id": True}, "field 'id': expected a string or a number, got bool"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = write(tmp_path / "d.jsonl", {**QUESTION, **change}, {**QUESTION, "id": "ok"}, [1])
    with pytest.raises(DataErrors) as found:
        read_items(task(), path)
    assert str(found.value.errors[0]) == f"{path}:1: {problem}"
    assert str(found.value.errors[1]) == f"{path}:3: expected an object, got list"


def test_an_id_stands_once_and_limit_is_obeyed(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", QUESTION, QUESTION)
    with pytest.raises(DataErrors, match="'q1' already stands in line 1"):
        read_items(task(), path)
    assert len(read_items(task(), path, limit=1)) == 1


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"promt": {}}, "promt = {}: no such key; did you mean prompt?"),
        ({"vote": {"treshold": 2}}, "vote.treshold = 2: no such key; did you mean vote.threshold?"),
        ({"kind": "chioce"}, "kind = chioce: expected choice | "),
        ({"sampling": {"n": "5"}}, "sampling.n = 5: expected a whole number"),
        ({"sampling": {"n": 0}}, "n = 0: must be 1 or more"),
        ({"vote": {"threshold": 2}}, "vote.threshold = 2: must be 1 to sampling.n = 1"),
        ({"score": {"k": [1, 2]}}, "score.k = 1,2: must be 1 to sampling.n = 1"),
        ({"score": {"rule": "reward"}}, "score.rule = reward: is for kind = preference"),
        ({"kind": "choice_logprob"}, "prompt.completion = : required"),
        ({"kind": "perplexity", "prompt": {"completion": "{x}"}, "sampling": {}}, "sampling: kind perplexity draws no"),
        ({"prompt": {"option": "{letter}"}}, "prompt.option = {letter}: may have {label} and {text} only"),
        ({"prompt": {"api": "completions", "system": "x"}}, "prompt.system = x: needs api chat"),
        ({"name": ""}, "name = : expected text"),
    ],
)
def test_bad_tasks(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as found:
        parse_task({"name": "t", "kind": "choice", **tables})
    assert str(found.value).startswith(message)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text("name = 1\nkind = 'choice'", encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.toml: name = 1: expected text"):
        load_task(path)
    path.write_text("name", encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.toml: bad TOML"):
        load_task(path)
    with pytest.raises(UserError, match="choice_cot, choice_direct"):
        load_task("no_such_task")


def test_the_digest_is_of_all_that_is_said() -> None:
    assert task().digest == task(vote={"threshold": 1}).digest != task(sampling={"seed": 1}).digest
    other = task(prompt={"text": "{question}?"})
    assert task(sampling={"seed": 1}).template_digest == task().template_digest != other.template_digest


def test_a_line_end_is_a_stop_text_and_nothing_is_none() -> None:
    tables = {"name": "t", "kind": "numeric", "sampling": {"stop": ["\n", "\n\n"]}}
    assert parse_task(tables).sampling.stop == ("\n", "\n\n")
    with pytest.raises(UserError, match="sampling.stop"):
        parse_task({**tables, "sampling": {"stop": [""]}})
