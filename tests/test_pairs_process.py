"""Pairs by process rewards, worked by hand: what is aggregated, who must be right, and what a scores file may hold."""

from pathlib import Path
from typing import Any

import pytest
from pool_fixtures import attempt, rows_of

from data_tools.jsonl import write_rows
from data_tools.pairs import process
from data_tools.pairs.process import read_scores
from data_tools.pool import write_pool

# text, verdict, step scores: means 0.9, 0.5, 0.7, 0.3
ANSWERS = [
    ("good", "correct", [0.9, 0.9]),
    ("lucky", "correct", [0.1, 0.9]),
    ("near miss", "wrong", [1.0, 0.4]),
    ("bad", "wrong", [0.4, 0.2]),
]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    pool, scores = tmp_path / "pool.jsonl", tmp_path / "scores.jsonl"
    more = [attempt("other question", question="o"), attempt("unscored", "wrong", sample=9)]
    write_pool(pool, [attempt(text, verdict, place) for place, (text, verdict, _) in enumerate(ANSWERS)] + more)
    rows: list[dict[str, Any]] = [{"id": "q", "sample": 9, "score": None, "step_scores": []}]
    rows += [{"id": "q", "sample": n, "score": n / 10, "step_scores": own} for n, (_, _, own) in enumerate(ANSWERS)]
    write_rows(scores, [*rows, {"id": "o#0", "score": 0.5, "step_scores": [0.5]}])
    return ["pairs", "--pool", str(pool), "--scores", str(scores), "--out", str(tmp_path / "out.jsonl")]


def build(files: list[str], *options: str) -> list[tuple[str, str]]:
    assert process.main([*files, *options]) == 0
    return [(row["chosen"], row["rejected"]) for row in rows_of(Path(files[6]))]


def test_widest_first_and_at_least_eta(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    every = ["--aggregate", "mean", "--uses", "9", "--per-question", "9"]
    chosen = [("good", "bad"), ("good", "lucky"), ("good", "near miss"), ("lucky", "bad")]
    assert build(files, *every, "--eta", "0.2") == chosen  # 0.6, 0.4, 0.2, 0.2
    assert build(files, *every, "--eta", "0.3") == chosen[:2]
    assert build(files, *every, "--eta", "0.2", "--require-correct", "both") == [chosen[0], *chosen[2:]]
    free = [("good", "bad"), ("good", "lucky"), ("near miss", "bad"), ("good", "near miss"), ("lucky", "bad")]
    assert build(files, *every, "--eta", "0.2", "--require-correct", "none") == [*free, ("near miss", "lucky")]
    capsys.readouterr()
    assert build(files, "--aggregate", "mean", "--eta", "0.2") == [("good", "bad")]
    assert capsys.readouterr().out == (
        f"2 questions, 6 answers: 1 pairs (1 right over wrong, 0 of two right, 0 of two wrong, 0 wrong over right) in "
        f"{files[6]}; chosen is the longer text in 100%; dropped: 1 without a score, 3 pairs of an answer used up\n"
    )


def test_records(files: list[str]) -> None:
    build(files, "--aggregate", "mean", "--eta", "0.6")
    (row,) = rows_of(Path(files[6]))
    assert (row["id"], row["source"], row["question_id"]) == ("q#0#3", "process", "q")
    assert row["scores"] == {"chosen": pytest.approx(0.9), "rejected": pytest.approx(0.3)}
    assert row["verified"] == {"chosen": "correct", "rejected": "wrong"}


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        (None, [0.0, 0.1, 0.2, 0.3]),
        ("mean", [0.9, 0.5, 0.7, 0.3]),
        ("min", [0.9, 0.1, 0.4, 0.2]),
        ("last", [0.9, 0.9, 0.4, 0.2]),
        ("product", [0.81, 0.09, 0.4, 0.08]),
    ],
)
def test_aggregates(aggregate: str | None, expected: list[float], files: list[str]) -> None:
    found = read_scores(files[4], aggregate)
    assert [found["q", place] for place in range(4)] == pytest.approx(expected)  # float64 sums of two
    assert found["o", 0] == 0.5


def test_equal_rewards_and_equal_texts_make_no_pair(files: list[str], tmp_path: Path) -> None:
    write_pool(tmp_path / "pool.jsonl", [attempt("a"), attempt("b", "wrong", 1), attempt("a ", "wrong", 2)])
    write_rows(tmp_path / "scores.jsonl", [{"id": f"q#{n}", "score": score} for n, score in enumerate((0.5, 0.5, 0.1))])
    assert build(files, "--eta", "0") == []
    assert rows_of(Path(files[6])) == []


def test_chance_is_repeatable(files: list[str]) -> None:
    options = ["--eta", "0", "--pick", "random", "--require-correct", "none", "--per-question", "2", "--uses", "9"]
    first = build(files, *options)
    assert build(files, *options) == first and len(first) == 2
    assert any(build(files, *options, "--seed", str(seed)) != first for seed in range(1, 6))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "q", "score": 1}, "field 'sample': missing, and the id does not end in '#<sample>'"),
        ({"id": "q", "sample": 0, "score": "x"}, "field 'score': expected a number, got 'x'"),
        ({"id": "q#0", "score": True}, "field 'score': expected a number"),
        ([1], "expected an object"),
        ({"id": "q", "sample": 1, "score": 1}, "answer 1 of 'q' is scored twice"),
    ],
)
def test_scores_that_cannot_be(row: Any, words: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    scores = Path(files[4])
    write_rows(scores, [{"id": "q", "sample": 1, "score": 0.5}, row])
    assert process.main(files) == 2
    assert f"{scores}:2: " in (error := capsys.readouterr().err) and words in error
    assert process.main([*files, "--aggregate", "mean"]) == 2
    assert f"{scores}:1: field 'step_scores': expected a list" in capsys.readouterr().err
    assert process.main([*files, "--eta", "-1"]) == 2
    assert "--eta -1.0: must be 0 or more" in capsys.readouterr().err
