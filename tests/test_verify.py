"""The command: samples in, verdicts out, faults with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.verify import main

QUESTION = {"id": "q1", "options": {"A": "London", "B": "Paris"}, "answer": "B"}
PROBLEM = {"id": "p1", "final_answer": "42", "answer": "6 * 7 = 42\n#### 42"}
TASK = {"task_id": "c1", "test_list": ["assert twice(2) == 4"], "code": "def twice(x): return 2 * x"}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(tmp_path: Path, kind: str, samples: list[Any], tasks: list[Any] | None = None) -> list[dict[str, Any]]:
    out = tmp_path / "verdicts.jsonl"
    argv = ["--kind", kind, "--samples", write(tmp_path / "samples.jsonl", samples), "--out", str(out)]
    assert main(argv + (["--tasks", write(tmp_path / "tasks.jsonl", tasks)] if tasks else [])) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_options_by_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["The answer is (B).", "A", "I don't know"]
    rows = run(tmp_path, "option", [{"id": "q1", "sample": i, "text": t} for i, t in enumerate(texts)], [QUESTION])
    assert [(r["id"], r["sample"], r["verdict"], r["extracted"]) for r in rows] == [
        ("q1", 0, "correct", "B"),
        ("q1", 1, "wrong", "A"),
        ("q1", 2, "invalid", None),
    ]
    assert "3 samples: 1 correct, 1 wrong, 1 invalid" in capsys.readouterr().out


def test_numbers_in_their_own_rows(tmp_path: Path) -> None:
    rows = run(tmp_path, "number", [{**PROBLEM, "response": "So 42."}, {"id": 2, "gold": 0.5, "text": "It is 1/2."}])
    assert [row["verdict"] for row in rows] == ["correct", "correct"]
    assert rows[1]["id"] == 2 and rows[1]["extracted"] == "0.5"


def test_code(tmp_path: Path) -> None:
    texts = ["```python\ndef twice(x):\n    return x + x\n```", "def twice(x): return x", "No."]
    rows = run(tmp_path, "code", [{"id": "c1", "text": text} for text in texts], [TASK])
    assert [row["verdict"] for row in rows] == ["correct", "wrong", "invalid"]
    assert rows[1]["why"].startswith("test line 2: assert twice(2) == 4: AssertionError")
    assert rows[0]["sandbox"]["network"].startswith("closed") and rows[0]["limit"] is None


@pytest.mark.parametrize(
    ("kind", "sample", "said"),
    [
        ("option", {"id": "q1"}, "samples.jsonl:1: field 'text': expected the answer as a string, got NoneType"),
        ("option", {"id": "q9", "text": "A"}, "samples.jsonl:1: field 'id': 'q9' is no id of the tasks file"),
        ("option", "A", "samples.jsonl:1: expected an object, got str"),
        ("number", {"id": "q1", "text": "4"}, "samples.jsonl:1: gold 'B' is no number"),
        ("code", {"id": "q1", "text": "x"}, "samples.jsonl:1: has no tests"),
        ("option", {"text": "A"}, "samples.jsonl:1: field 'id': expected a string or a number, got NoneType"),
    ],
)
def test_a_fault_names_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, sample: Any, said: str
) -> None:
    samples, tasks = write(tmp_path / "samples.jsonl", [sample]), write(tmp_path / "tasks.jsonl", [QUESTION])
    out = tmp_path / "out.jsonl"
    assert main(["--kind", kind, "--samples", samples, "--tasks", tasks, "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_options_of_a_wrong_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"text": "A", "options": ["x"], "gold": "A"},
        {"text": "A", "options": ["x", "y"], "gold": "Q"},
        {"text": "A", "options": "xy", "gold": "A"},
        {"text": "A", "options": ["x", "y"]},
    ]
    samples = write(tmp_path / "samples.jsonl", rows)
    assert main(["--kind", "option", "--samples", samples, "--out", str(tmp_path / "o")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("samples.jsonl:")[1][:2] for line in lines[:4]] == ["1:", "2:", "3:", "4:"]
    assert "4 errors" in lines[4]


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write(tmp_path / "samples.jsonl", [{**PROBLEM, "text": "42"}])
    (tmp_path / "no").write_text("a file")
    assert main(["--kind", "number", "--samples", samples, "--out", str(tmp_path / "no" / "o.jsonl")]) == 2
    assert "cannot be written" in capsys.readouterr().err
