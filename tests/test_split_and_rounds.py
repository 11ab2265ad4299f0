"""Parts that share no question; going on or stopping after a round, and the files of the best one."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_tools import rounds, split
from data_tools.jsonl import write_rows
from data_tools.pipeline_plan import says_stop


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(folder: Path, count: int) -> Path:
    path = folder / "q.jsonl"
    write_rows(path, [{"id": f"q{k}", "question": f"{k} + 1?", "extra": [k]} for k in range(count)])
    return path


def cut(folder: Path, count: int, *parts: str, seed: int = 0) -> int:
    asked = [word for part in parts for word in ("--part", part)]
    out = ["--out-dir", str(folder / "parts"), "--seed", str(seed)]
    return split.main(["--questions", str(questions(folder, count)), *asked, *out])


def test_parts_share_no_row_and_hold_them_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cut(tmp_path, 20, "train=rest", "dev=3", "test=5") == 0
    said = f"20 questions (0 repeats left out): 12 train, 3 dev, 5 test in {tmp_path}/parts\n"
    assert capsys.readouterr().out == said
    parts = {name: rows_of(tmp_path / "parts" / f"{name}.jsonl") for name in ("train", "dev", "test")}
    ids = {name: [row["id"] for row in rows] for name, rows in parts.items()}
    assert sorted(sum(ids.values(), []), key=lambda name: int(name[1:])) == [f"q{k}" for k in range(20)]
    assert all(own == sorted(own, key=lambda name: int(name[1:])) for own in ids.values())
    assert parts["dev"][0] == {
        "id": ids["dev"][0],
        "question": f"{ids['dev'][0][1:]} + 1?",
        "extra": [parts["dev"][0]["extra"][0]],
    }
    before = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    assert cut(tmp_path, 20, "train=rest", "dev=3", "test=5") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == before
    assert cut(tmp_path, 20, "train=rest", "dev=3", "test=5", seed=1) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()} != before


def test_a_repeated_question_is_on_one_side_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = "Which is right?"
    rows = [
        {"id": "a", "question": stem, "options": {"A": "x", "B": "y"}},
        {"id": "b", "question": " Which  is\nright?", "options": {"A": "x", "B": "y"}},
        {"id": "c", "question": stem, "options": {"A": "x", "B": "z"}},
    ]
    write_rows(tmp_path / "q.jsonl", rows)
    base = ["--questions", str(tmp_path / "q.jsonl"), "--out-dir", str(tmp_path)]
    assert split.main([*base, "--part", "one=1", "--part", "two=1"]) == 0
    assert "3 questions (1 repeats left out): 1 one, 1 two" in capsys.readouterr().out
    assert {rows_of(tmp_path / f"{name}.jsonl")[0]["id"] for name in ("one", "two")} == {"a", "c"}


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (["train=9", "dev=2"], "10 different questions, 11 are asked for"),
        (["train=10", "dev=rest"], "10 different questions, 10 are asked for"),
        (["train=0"], "expected name=count or name=rest"),
        (["a/b=1"], "expected name=count or name=rest"),
        (["train=1", "train=2"], "a name stands once"),
        (["train=rest", "dev=rest"], "a name stands once, and so does rest"),
    ],
)
def test_parts_that_cannot_be(
    parts: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cut(tmp_path, 10, *parts) == 2
    assert problem in capsys.readouterr().err and not (tmp_path / "parts").exists()


def reports(folder: Path, *scores: float, metric: str = "accuracy", items: int = 50) -> list[str]:
    found = []
    for number, score in enumerate(scores):
        path = folder / f"r{number}.json"
        path.write_text(json.dumps({"result": {"metric": metric, "items": items, "micro": {"value": score}}}))
        found.append(str(path))
    return found


def state(folder: Path, scores: Sequence[float], *more: str) -> list[str]:
    out = folder / "state"
    assert rounds.main(["state", "--reports", *reports(folder, *scores), "--out", str(out), *more]) == 0
    lines = out.read_text().splitlines()
    assert says_stop(str(out)) == (lines[0] == "stop")  # as a recipe's loop reads it
    return lines


def test_rounds_stop_when_the_last_score_is_below_the_best_before(tmp_path: Path) -> None:
    assert state(tmp_path, [0.5])[:2] == ["go on", "no fall; best is 0"]
    assert state(tmp_path, [0.5, 0.5])[:2] == [
        "go on",
        "no fall; best is 0",
    ]  # equal is no fall, and the earlier one is the best
    assert state(tmp_path, [0.5, 0.625])[:2] == ["go on", "no fall; best is 1"]
    fell = state(tmp_path, [0.5, 0.625, 0.5625])
    assert fell[:2] == ["stop", "the last score fell; best is 1"]
    assert fell[2:] == [f"{k} {score} {tmp_path}/r{k}.json" for k, score in enumerate(["0.5000", "0.6250", "0.5625"])]
    assert state(tmp_path, [0.5, 0.625, 0.5625], "--tolerance", "0.0625")[:2] == ["go on", "no fall; best is 1"]


def test_the_best_rounds_files_take_no_room_and_replace_only_an_earlier_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("start", "one"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "weights").write_text(name)
    folders, out = ["--folders", str(tmp_path / "start"), str(tmp_path / "one")], tmp_path / "best"
    best = ["best", *folders, "--out", str(out), "--reports"]
    assert rounds.main([*best, *reports(tmp_path, 0.25, 0.5)]) == 0
    assert f"the files of {tmp_path}/one (score 0.5000, place 1 of 2)" in capsys.readouterr().out
    assert os.path.samefile(out / "sub" / "weights", tmp_path / "one" / "sub" / "weights")
    assert json.loads((out / "best.json").read_text()) == {"files_of": str(tmp_path / "one")}
    assert rounds.main([*best, *reports(tmp_path, 0.5, 0.5)]) == 0
    assert (out / "sub" / "weights").read_text() == "start"
    assert (tmp_path / "one" / "sub" / "weights").read_text() == "one" and not (tmp_path / "start/best.json").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    code = rounds.main(["best", *folders, "--out", str(foreign), "--reports", *reports(tmp_path, 0.5, 0.5)])
    assert code == 2 and "is no folder of this command" in capsys.readouterr().err and foreign.is_dir()


def test_reports_that_do_not_compare_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first,) = reports(tmp_path, 0.5)
    other = tmp_path / "other"
    other.mkdir()
    (second,) = reports(other, 0.5, items=49)
    assert rounds.main(["state", "--reports", first, second, "--out", str(tmp_path / "s")]) == 2
    assert "accuracy over 49 items" in capsys.readouterr().err
    assert rounds.main(["state", "--reports", str(tmp_path / "no.json"), "--out", str(tmp_path / "s")]) == 2
    assert "is no report.json of a finished" in capsys.readouterr().err
    best = ["best", "--reports", first, "--folders", "a", "b", "--out", str(tmp_path / "b")]
    assert rounds.main(best) == 2 and "--folders: 2 for 1 reports" in capsys.readouterr().err


def test_reports_in_one_table(tmp_path: Path) -> None:
    own = {"value": 0.5, "low": 0.25, "high": 0.75}
    result = {"metric": "accuracy", "items": 8, "micro": own, "prm": {"best_of_n": {**own, "value": 0.625}}}
    report = {"result": result, "comparison": {"difference": {"value": 0.125, "low": -0.125, "high": 0.375}}}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "report.json").write_text(json.dumps(report))
    out = tmp_path / "t.md"
    assert rounds.main(["table", "--reports", str(tmp_path / "a" / "report.json"), "--out", str(out)]) == 0
    assert out.read_text().splitlines()[2:] == [
        f"| {tmp_path}/a | accuracy | 8 | 0.500 | 0.250 to 0.750 | +0.125 (-0.125 to +0.375) |",
        f"| {tmp_path}/a, by reward: best of n | accuracy | 8 | 0.625 | 0.250 to 0.750 |  |",
    ]
