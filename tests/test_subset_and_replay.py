"""Rows drawn by a seed, and answers that are there already in place of a model's."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools import distill, replay, subset, verify
from data_tools.jsonl import write_rows
from data_tools.pairs.exchange import read_answers
from data_tools.samples import read_samples


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(name: str, gold: str = "B", explanation: str | None = "Because.") -> dict[str, Any]:
    options = {"A": "liver", "B": "heart"}
    return {"id": name, "question": f"{name}?", "options": options, "answer": gold, "explanation": explanation}


def test_a_larger_draw_holds_the_smaller_one_in_the_order_of_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "q.jsonl", [question(f"q{k}", explanation=None if k % 5 == 0 else "x") for k in range(40)])
    drawn = {}
    for count, seed in ((4, 0), (9, 0), (9, 1)):
        out = tmp_path / f"{count}_{seed}.jsonl"
        more = ["--count", str(count), "--seed", str(seed), "--need", "explanation", "--out", str(out)]
        assert subset.main(["--rows", str(tmp_path / "q.jsonl"), *more]) == 0
        drawn[count, seed] = [row["id"] for row in rows_of(out)]
    assert [len(own) for own in drawn.values()] == [4, 9, 9]
    assert set(drawn[4, 0]) < set(drawn[9, 0]) != set(drawn[9, 1])
    assert drawn[9, 0] == sorted(drawn[9, 0], key=lambda name: int(name[1:]))
    assert not {f"q{k}" for k in range(0, 40, 5)} & set(drawn[9, 0])


def test_counts_of_a_draw_and_an_id_that_stands_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    write_rows(path, [question("a"), question("b", explanation=""), question("c")])
    assert subset.main(["--rows", str(path), "--need", "explanation", "--count", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out.strip()
    assert said == f"3 rows: 1 in {out}; dropped: 1 without explanation, 1 not drawn"
    assert subset.main(["--rows", str(path), "--out", str(out)]) == 0
    assert rows_of(out) == rows_of(path)
    write_rows(path, [question("a"), question("a")])
    assert subset.main(["--rows", str(path), "--out", str(out)]) == 2
    assert "q.jsonl:2: field 'id': 'a' already stands in line 1" in capsys.readouterr().err


def test_explanations_of_a_set_as_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three requests: one of a question with an explanation, one of a question without, one of no question."""
    write_rows(tmp_path / "q.jsonl", [question("q1"), question("q2", explanation=None)])
    requests = [{"id": name, "prompt": f"about {name}"} for name in ("q1#0#t", "q2#0#t", "q3")]
    write_rows(tmp_path / "r.jsonl", requests)
    files = ["--requests", str(tmp_path / "r.jsonl"), "--answers", str(tmp_path / "q.jsonl")]
    out = tmp_path / "s.jsonl"
    text = ["--kind", "option", "--text", "{explanation}\nThe answer is ({gold}) {gold_text}.", "--model", "the set"]
    assert replay.main([*files, *text, "--out", str(out)]) == 0
    said = capsys.readouterr().out.strip()
    assert said == f"3 requests: 1 samples in {out}, 2 requests without an answer; dropped: 1 without explanation"
    (answer,) = read_answers(tmp_path / "r.jsonl", out)  # checks the prompt's digest
    assert (answer.id, answer.sample.model) == ("q1#0#t", "the set")
    assert answer.sample.text == "Because.\nThe answer is (B) heart."


def test_a_recorded_samples_file_keeps_its_makers_and_says_what_was_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "r.jsonl", [{"id": "q1", "prompt": "now"}])
    recorded = [
        {"id": "q1", "sample": 0, "text": "one", "finish_reason": "stop", "model": "M"},
        {"id": "q1", "sample": 1, "text": "tw", "finish_reason": "length", "model": "M"},
    ]
    write_rows(tmp_path / "old.jsonl", recorded)
    files = ["--requests", str(tmp_path / "r.jsonl"), "--answers", str(tmp_path / "old.jsonl")]
    assert replay.main([*files, "--out", str(tmp_path / "s.jsonl")]) == 0
    found = read_samples(tmp_path / "s.jsonl").samples
    assert [(own.sample, own.text, own.finish_reason, own.model) for own in found] == [
        (0, "one", "stop", "M"),
        (1, "tw", "length", "M"),
    ]
    write_rows(tmp_path / "old.jsonl", [{"id": "q1", "text": "one"}])
    capsys.readouterr()
    assert replay.main([*files, "--out", str(tmp_path / "s.jsonl")]) == 2
    assert "say --model NAME" in capsys.readouterr().err


def test_a_step_that_kept_no_question_is_followed_by_steps_without_rows(tmp_path: Path) -> None:
    """What a question writer that wrote nothing usable leaves: every later command takes the empty file."""
    for name in ("q.jsonl", "r.jsonl", "s.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "p.toml").write_text('[distill]\ntext = "{question}"\n')
    q, r, s, v = (str(tmp_path / f"{name}.jsonl") for name in "qrsv")
    own = ["--questions", q, "--kind", "option"]
    assert distill.main(["requests", *own, "--prompts", str(tmp_path / "p.toml"), "--out", r]) == 0
    assert verify.main(["--kind", "option", "--tasks", q, "--samples", s, "--out", v]) == 0
    assert distill.main(["agree", *own, "--verdicts", v, "--least", "1", "--of", "1", "--out", f"{q}2"]) == 0
    files = ["--requests", r, "--samples", s, "--verdicts", v]
    assert distill.main(["rows", *own, *files, "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == b""
