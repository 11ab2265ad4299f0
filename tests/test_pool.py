"""A pool over rounds: names that stay, what is refused, and the answers that are not used."""

from collections import Counter
from pathlib import Path

import pytest
from pool_fixtures import attempt, rows_of, write_answers

from data_tools import pool
from data_tools.jsonl import write_rows
from data_tools.pool import by_question, read_pool, usable, write_pool


def test_rounds_add_up_and_names_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "q.jsonl"
    write_rows(questions, [{"id": "a"}, {"id": "a#b"}])
    files = write_answers(tmp_path, {"a": [("1", "correct"), ("2", "wrong")], "a#b#x": [("3", "invalid")]})
    first, second = tmp_path / "p0.jsonl", tmp_path / "p1.jsonl"
    common = [*files, "--questions", str(questions)]
    assert pool.main(["add", *common, "--out", str(first)]) == 0
    assert (
        capsys.readouterr().out == f"0 answers and 3 of round 0: 1 correct, 1 wrong, 1 invalid, 2 questions; {first}\n"
    )
    assert pool.main(["add", *common, "--round", "1", "--earlier", str(first), "--out", str(second)]) == 0
    found = read_pool(second)
    assert [own.key for own in found[:3]] == [own.key for own in read_pool(first)]
    assert [(own.id, own.question_id, own.tag, own.round) for own in found] == [
        ("a", "a", "0", 0), ("a", "a", "1", 0), ("a#b#x", "a#b", "x.0", 0),
        ("a#r1", "a", "r1.0", 1), ("a#r1", "a", "r1.1", 1), ("a#b#x#r1", "a#b", "x.r1.0", 1),
    ]  # fmt: skip
    assert {name: len(own) for name, own in by_question(found).items()} == {"a": 4, "a#b": 2}
    before = second.read_bytes()
    write_pool(second, found)
    assert second.read_bytes() == before and rows_of(second)[0]["prompt"] == "a?"
    assert (
        pool.main(["add", *common, "--round", "1", "--earlier", str(second), "--out", str(tmp_path / "p2.jsonl")]) == 2
    )
    assert "holds answers of round 1 already" in capsys.readouterr().err


def test_a_pool_as_files_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "p.jsonl", tmp_path / "again.jsonl"
    later = {"id": "q#r1", "question_id": "q", "round": 1}
    write_pool(first, [attempt("x", completion_tokens=3), attempt("y", "wrong", sample=1), attempt("z", **later)])
    files = [part for name in ("requests", "samples", "verdicts") for part in (f"--{name}", str(tmp_path / name))]
    assert pool.main(["files", "--pool", str(first), *files]) == 0
    assert "2 requests in" in (shown := capsys.readouterr().out) and "3 samples in" in shown
    assert pool.main(["add", *files, "--out", str(second)]) == 0
    kept = [{**row, "round": 0, "question_id": row["id"]} for row in rows_of(first)]
    assert rows_of(second) == kept
    write_pool(first, [attempt("x"), attempt("y", sample=1, prompt="Q?")])
    assert pool.main(["files", "--pool", str(first), *files]) == 2
    assert "'q' has several prompts" in capsys.readouterr().err


def test_an_answer_that_went_on_from_a_beginning_is_whole(tmp_path: Path) -> None:
    files = write_answers(tmp_path, {"a": [(" three.", "correct")]}, prefixes={"a": "It is"})
    out = tmp_path / "p.jsonl"
    assert pool.main(["add", *files, "--out", str(out)]) == 0
    assert read_pool(out)[0].text == "It is three."


def test_what_is_not_used_is_counted() -> None:
    answers = [
        attempt("right"),
        attempt("half of", sample=1, finish_reason="length"),
        attempt(" \n", "wrong", sample=2),
        attempt("?", "invalid", sample=3),
    ]
    for invalid, kept in (("drop", 1), ("wrong", 2)):
        dropped = Counter[str]()
        assert len(usable(answers, invalid=invalid, dropped=dropped)) == kept
        assert dropped == {"cut off": 1, "empty": 1} | ({"invalid": 1} if invalid == "drop" else {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"verdict": "right"}, "field 'verdict': expected one of correct"),
        ({"sample": True}, "field 'sample': is missing or of another kind"),
        ({"text": None}, "field 'text'"),
        ({"completion_tokens": "3"}, "field 'completion_tokens'"),
        ({"prompt": []}, "prompt"),
        ({}, "answer 0 of 'q' stands twice"),
    ],
)
def test_rows_that_are_no_pool(
    change: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    row = attempt("x").row()
    write_rows(path, [row, {**row, **change}])
    files = write_answers(tmp_path, {"a": [("1", "correct")]})
    assert pool.main(["add", *files, "--earlier", str(path), "--out", str(tmp_path / "o.jsonl")]) == 2
    assert f"{path}:2: " in (error := capsys.readouterr().err) and words in error
