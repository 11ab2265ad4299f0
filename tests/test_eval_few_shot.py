"""Examples before the prompts of a task: how they are written, which rows they are, what refuses, what is reported."""

from pathlib import Path
from typing import Any

import pytest
from eval_fixtures import evaluate, read_json, read_log, run, write_rows, write_samples

from data_tools.samples import read_prompts
from data_tools.schema import Message
from eval.items import read_items
from eval.task import load_task, parse_task, with_few_shot
from trainer.errors import UserError

ROWS = [
    {"id": "a", "question": "1 + 1?", "options": {"A": "two", "B": "ten"}, "answer": "A", "why": "One more."},
    {"id": "b", "question": "2 + 2?", "options": {"A": "ten", "B": "four"}, "answer": "B", "why": "Two more."},
    {"id": "c", "question": "5 + 5?", "options": {"A": "ten", "B": "four"}, "answer": "A", "why": "Five more."},
]


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "shots.jsonl", ROWS)


def task(kind: str, shots: Path, count: int | None = None, **prompt: Any) -> Any:
    tables = {"text": "{question}", **prompt}
    return with_few_shot(parse_task({"name": "t", "kind": kind, "prompt": tables}), str(shots), count)


def test_plain_text_in_the_very_form_of_the_item(shots: Path, tmp_path: Path) -> None:
    """The whole prompt by hand; the item, which is the first row with its options turned, is not its own example."""
    turned = {**ROWS[0], "id": "other", "options": {"A": "ten", "B": "two"}, "answer": "B"}
    data = write_rows(tmp_path / "d.jsonl", [turned])
    form = {"api": "completions", "text": "Q: {question}\n{options}\nA:", "completion": " {label}"}
    (item,) = read_items(task("choice_logprob", shots, 2, **form), data)
    assert item.prompt == (
        "Q: 2 + 2?\nA. ten\nB. four\nA: B\n\nQ: 5 + 5?\nA. ten\nB. four\nA: A\n\nQ: 1 + 1?\nA. ten\nB. two\nA:"
    )
    assert item.completions == (" A", " B") and item.gold == "B"


def test_turns_of_a_conversation(shots: Path, tmp_path: Path) -> None:
    form = {"system": "Be brief.", "shot": "{why} The answer is ({gold}), {gold_text}."}
    (item,) = read_items(task("choice", shots, 1, **form), write_rows(tmp_path / "d.jsonl", ROWS[:1]))
    assert item.prompt == (
        Message("system", "Be brief."),
        Message("user", "2 + 2?"),
        Message("assistant", "Two more. The answer is (B), four."),
        Message("user", "1 + 1?"),
    )
    assert item.values["question"] == "1 + 1?"  # what a judge or a verifier is shown: without examples


def test_perplexity_and_all_rows(shots: Path, tmp_path: Path) -> None:
    """No number of shots: all rows but the item's own."""
    form = {"api": "completions", "completion": " {why}"}
    (item,) = read_items(task("perplexity", shots, **form), write_rows(tmp_path / "d.jsonl", ROWS[1:2]))
    assert item.prompt == "1 + 1? One more.\n\n5 + 5? Five more.\n\n2 + 2?"
    assert item.completions == (" Two more.",)


def test_eight_shots_of_gsm8k(shared_dir: Path, tmp_path: Path) -> None:
    """The published chain-of-thought baseline: eight worked training problems before each test problem."""
    data, file = shared_dir / "data" / "gsm8k", tmp_path / "own.toml"
    text = 'name = "8-shot"\nkind = "numeric"\n[fields]\nanswer = "final_answer"\n[prompt]\napi = "completions"\n'
    text += f'text = "Q: {{question}}\\nA:"\nshot = " {{answer}}"\nfew_shot = "{data / "train.jsonl"}"\nshots = 8\n'
    file.write_text(text, encoding="utf-8")
    items = read_items(load_task(file), data / "test.jsonl", limit=3)
    for item in items:
        assert isinstance(item.prompt, str)
        assert item.prompt.count("Q: ") == 9 and item.prompt.count("#### ") == 8
        assert item.prompt.endswith(f"\n\nQ: {item.values['question']}\nA:")


def test_the_examples_are_part_of_the_run(
    shots: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path beside the task file; other examples are another run; the same file elsewhere is the same run."""
    (tmp_path / "tasks").mkdir()
    file, data = tmp_path / "tasks" / "t.toml", write_rows(tmp_path / "d.jsonl", ROWS)
    text = 'name = "t"\nkind = "choice_logprob"\n[prompt]\ntext = "{question}"\ncompletion = "{text}"\n'
    file.write_text(text + 'few_shot = "../shots.jsonl"\nshots = 2\n', encoding="utf-8")
    out = tmp_path / "out"
    assert run(file, data, out, "--model", tiny_model_dir) == 0
    report, log = read_json(out / "report.json"), read_log(out / "items.jsonl")
    assert report["digests"]["few_shot_sha256"]
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(shots.read_bytes())
    assert run(file, data, out, "--model", tiny_model_dir, "--few-shot", moved, "--shots", 2) == 0
    assert run(file, data, out, "--model", tiny_model_dir, "--few-shot", moved, "--shots", 1) == 2
    assert "holds a run with another task, prompt_template; name another --out" in capsys.readouterr().err
    assert run("choice_logprob", data, tmp_path / "none", "--model", tiny_model_dir) == 0
    assert read_log(tmp_path / "none" / "items.jsonl")["a"]["likelihoods"] != log["a"]["likelihoods"]


def test_samples_drawn_without_the_examples_are_refused(
    shots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, prompts = write_rows(tmp_path / "d.jsonl", ROWS), tmp_path / "p.jsonl"
    few = ("--few-shot", shots, "--shots", 2)
    assert evaluate("prompts", "--task", "choice_direct", "--data", data, "--out", prompts, *few) == 0
    asked = {own.id: own.prompt for own in read_prompts(prompts)}
    texts = {name: ["A"] for name in asked}
    samples = write_samples(tmp_path / "s.jsonl", texts, asked)
    assert run("choice_direct", data, tmp_path / "out", "--samples", samples, *few) == 0
    write_samples(samples, texts)
    assert run("choice_direct", data, tmp_path / "new", "--samples", samples, *few) == 2
    assert "id 'a' was not drawn for this prompt with its examples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "count", "message"),
    [
        ("choice", 3, "has 2 examples for id 'a', prompt.shots is 3; an item is never an example of its own"),
        ("choice", 0, "prompt.shots = 0: must be 1 or more"),
        ("preference", 1, "preference takes none"),
        ("code", 1, "no tests"),
    ],
)
def test_what_refuses(kind: str, count: int, message: str, shots: Path) -> None:
    with pytest.raises(UserError) as found:
        read_items(task(kind, shots, count), shots)
    assert message in str(found.value)
    with pytest.raises(UserError, match="needs prompt.few_shot"):
        parse_task({"name": "t", "kind": "choice", "prompt": {"shots": 2}})
