"""Published question sets in their own shapes become question rows; what is not of its shape is named with its line."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.importers import main
from data_tools.questions import read_questions


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Any) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(name: str, path: Path, *more: str) -> list[dict[str, Any]]:
    out = path.with_name("out.jsonl")
    assert main([name, str(path), "--out", str(out), *more]) == 0
    return read(out)


def med(name: str, cop: int | None, **more: Any) -> dict[str, Any]:
    return {"id": name, "question": " Q? ", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": cop, **more}


def test_medmcqa_counts_from_one_or_from_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"exp": "Since.", "subject_name": "Anatomy", "topic_name": None, "choice_type": "single"}
    rows = load("medmcqa", write(tmp_path / "train.json", [med("a", 1, **more), med("b", 4)]))
    assert rows[0] == {
        "id": "a", "question": "Q?", "options": {"A": "1", "B": "2", "C": "3", "D": "4"}, "answer": "A",
        "explanation": "Since.", "subject": "Anatomy", "choice_type": "single", "source": "medmcqa",
    }  # fmt: skip
    assert rows[1]["answer"] == "D" and "explanation" not in rows[1]
    path = write(tmp_path / "hf.jsonl", [med("a", 1), med("b", 0)])
    assert [row["answer"] for row in load("medmcqa", path)] == ["B", "A"]
    path = write(tmp_path / "hidden.jsonl", [med("a", 1), med("b", -1), med("c", None)])
    assert main(["medmcqa", str(path), "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "neither 0 nor 4 somewhere; say with --cop-base" in capsys.readouterr().err
    assert main(["medmcqa", str(path), "--out", str(tmp_path / "x.jsonl"), "--cop-base", "1"]) == 2
    assert "hidden.jsonl:2: has no answer; --skip unanswered leaves such rows out" in capsys.readouterr().err
    assert [row["answer"] for row in load("medmcqa", path, "--cop-base", "1", "--skip", "unanswered")] == ["A"]
    assert "1 questions" in (said := capsys.readouterr().out) and "2 unanswered left out" in said


def test_medmcqa_as_csv_keeps_the_line_of_a_row_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = ["id", "question", "opa", "opb", "opc", "opd", "cop", "exp"]
    rows = [head, ["a", "Two\nlines?", "1", "2", "3", "4", "4", ""], ["b", "Q?", "1", "2", "3", "4", "5", "E"]]
    path = write_csv(tmp_path / "dev.csv", rows)
    assert main(["medmcqa", str(path), "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "dev.csv:4: field 'cop': 5 is none of 1 to 4" in capsys.readouterr().err
    (row,) = load("medmcqa", write_csv(path, rows[:2]))
    assert (row["question"], row["answer"]) == ("Two\nlines?", "D") and "explanation" not in row


def test_mmlu_in_both_shapes(tmp_path: Path) -> None:
    rows = [["Q1, with a comma?", "w", "x", "y", "z", "C"], ["Q2?", "1", "2", "3", "4", "A"]]
    expected = {
        "id": "college_biology_test-0", "question": "Q1, with a comma?",
        "options": {"A": "w", "B": "x", "C": "y", "D": "z"}, "answer": "C", "subject": "college_biology",
        "source": "mmlu",
    }  # fmt: skip
    found = load("mmlu", write_csv(tmp_path / "college_biology_test.csv", rows))
    assert found[0] == expected and found[1]["id"] == "college_biology_test-1"
    header = ["question", "A", "B", "C", "D", "answer"]
    assert load("mmlu", write_csv(tmp_path / "college_biology_test.csv", [header, *rows])) == found
    own = [{"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5]), "subject": "s"} for row in rows]
    found = load("mmlu", write(tmp_path / "test.jsonl", own))
    assert found[0] == {**expected, "id": "test-0", "subject": "s"}


def test_cmexam(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = ["Question", "Options", "Answer", "Explanation"]
    rows = [head, ["献血法共有", "A 21条\nB 22条\nC 23 条", "B", "共有22条。"], ["哪些是", "A 一\nB 二", "AB", ""]]
    path = write_csv(tmp_path / "val.csv", rows)
    assert main(["cmexam", str(path), "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "val.csv:5: has several answers; --skip multiple leaves such rows out" in capsys.readouterr().err
    assert load("cmexam", path, "--skip", "multiple") == [
        {
            "id": "val-0", "lang": "zh", "question": "献血法共有", "options": {"A": "21条", "B": "22条", "C": "23 条"},
            "answer": "B", "explanation": "共有22条。", "source": "cmexam",
        }
    ]  # fmt: skip
    write_csv(path, [head, ["Q", "A 一\n二", "A", ""], ["Q", "A 一\nA 二", "A", ""], ["Q", "A 一\nB 二", "C", ""]])
    assert main(["cmexam", str(path), "--out", str(tmp_path / "x.jsonl")]) == 2
    errors = capsys.readouterr().err
    assert (
        "val.csv:2: field 'Options': '二' is no line like 'A text'" in errors and "val.csv:4: field 'Options'" in errors
    )
    assert "val.csv:6:" in errors and "3 errors" in errors


def test_gsm8k_and_real_rows_back_from_their_published_shape(shared_dir: Path, tmp_path: Path) -> None:
    """The sets of ../shared, brought back to the shapes that they came in, give the rows that are there."""
    data = shared_dir / "data"
    gsm = read(data / "gsm8k" / "test.jsonl")
    path = write(tmp_path / "test.jsonl", [{"question": row["question"], "answer": row["answer"]} for row in gsm])
    for found, row in zip(load("gsm8k", path), gsm, strict=True):
        assert (found["final_answer"], found["answer"]) == (row["final_answer"], row["answer"].strip())
    assert len(read_questions(tmp_path / "out.jsonl", "number")) == 500

    med_rows = read(data / "medmcqa" / "train.jsonl")
    letters = "ABCD"
    published = [
        {
            "id": row["id"], "question": row["question"], "cop": letters.index(row["answer"]) + 1,
            **{f"op{letter.lower()}": row["options"][letter] for letter in letters},
            "exp": row["explanation"], "subject_name": row["subject"], "topic_name": row["topic"],
        }
        for row in med_rows
    ]  # fmt: skip
    for found, row in zip(load("medmcqa", write(tmp_path / "m.jsonl", published)), med_rows, strict=True):
        assert (found["id"], found["answer"]) == (row["id"], row["answer"])
        assert found["options"] == {letter: text.strip() for letter, text in row["options"].items()}
    assert len(read_questions(tmp_path / "out.jsonl", "option")) == len(med_rows)

    medqa = read(data / "medqa" / "test.jsonl")
    own = [{**row, "answer": row["options"][row["answer"]], "answer_idx": row["answer"]} for row in medqa]
    for found, row in zip(load("medqa", write(tmp_path / "d.jsonl", own)), medqa, strict=True):
        assert (found["id"], found["answer"], found["question"]) == (row["id"], row["answer"], row["question"].strip())


BAD = {
    "no final number": ("gsm8k", {"question": "Q?", "answer": "It is 4."}, "expected a solution with"),
    "no question": ("gsm8k", {"answer": "So.\n#### 4"}, "field 'question': missing"),
    "an option that is null": ("medmcqa", med("a", 4, opc=None), "field 'opc': expected a text, got None"),
    "a letter for a number": ("medmcqa", med("a", "B"), "field 'cop': expected a whole number, got 'B'"),  # type: ignore[arg-type]
    "too large": ("mmlu", {"question": "Q?", "choices": ["a", "b"], "answer": 2}, "2 is neither a letter nor a number"),
    "choices as text": ("mmlu", {"question": "Q?", "choices": "a b", "answer": 0}, "expected a list of texts"),
    "two equal options": ("mmlu", {"question": "Q?", "choices": ["a"], "answer": 0}, "a question needs 2 to 10"),
    "no letter": ("medqa", {"question": "Q?", "options": {"A": "a", "B": "b"}, "answer_idx": "C"}, "C"),
}


@pytest.mark.parametrize("kind", BAD)
def test_rows_that_are_not_of_their_shape(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, row, message = BAD[kind]
    path, out = write(tmp_path / "bad.jsonl", [row]), tmp_path / "out.jsonl"
    more = ["--cop-base", "1"] if name == "medmcqa" else []
    assert main([name, str(path), "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}:1: ") and message in error and not out.exists()


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content, message in (
        ("x.parquet", b"PAR1", "expected a name that ends in .csv, .json or .jsonl"),
        ("bom.csv", b"\xef\xbb\xbfQuestion,Options\n", "bom.csv:1: begins with a byte order mark"),
        ("latin.csv", b"Question\ncaf\xe9\n", "is not UTF-8"),
        ("open.csv", b'Question\n"never closed\n', "open.csv:2: is no CSV"),
        ("short.csv", b"Question,Options\nonly one\n", "short.csv:2: 1 cells, the header has 2"),
        ("empty.csv", b"", "is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        assert main(["cmexam", str(tmp_path / name), "--out", str(tmp_path / "out.jsonl")]) == 2
        assert message in capsys.readouterr().err
    assert main(["cmexam", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err
