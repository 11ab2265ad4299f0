"""Questions as builders and verifiers read them: whose a name is, what placeholders stand for, what is refused."""

import json
from pathlib import Path

import pytest

from data_tools.errors import DataErrors, UserError
from data_tools.questions import judge, question_id, read_questions

CHOICE = {"id": "q1", "question": "Which?", "options": ["red", "blue"], "answer": "B"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_name_is_of_the_question_before_its_last_marks() -> None:
    known = {"q1", "q1#b", "x#y"}
    names = ("q1", "q1#0", "q1#b#3#1", "q1#c#3", "x#y#0", "x#0", "q2", "q")
    assert [question_id(name, known) for name in names] == ["q1", "q1", "q1#b", "q1", "x#y", None, None, None]


def test_placeholders_of_a_choice_and_its_judgement(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path / "q.jsonl", CHOICE), "option", option_line="({label}) {text}")
    wanted = {"options": "(A) red\n(B) blue", "labels": "A, B", "gold": "B", "gold_text": "blue", "question": "Which?"}
    assert {name: question.values[name] for name in wanted} == wanted
    assert judge(question, "The answer is (B).").verdict == "correct"
    assert judge(question, "The answer is (A).").verdict == "wrong"
    assert judge(question, "Hm.").verdict == "invalid"


def test_numbers_take_the_final_answer_before_the_worked_one(tmp_path: Path) -> None:
    row = {"id": 7, "question": "2 + 5?", "answer": "It is 2 + 5 = 7.", "final_answer": "7"}
    (question,) = read_questions(write(tmp_path / "q.jsonl", row), "number")
    assert (question.id, question.gold) == ("7", "7")
    assert [judge(question, f"The answer is {n}.").verdict for n in (7, 8)] == ["correct", "wrong"]


def test_a_free_question_has_no_rule(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "Why?", "reference": "Because."}, {"id": "b", "question": "How?"}]
    first, second = read_questions(write(tmp_path / "q.jsonl", *rows), "free")
    assert (first.gold, second.gold) == ("Because.", None)
    with pytest.raises(ValueError, match="no rule judges it"):
        judge(first, "Because.")


def test_faults_name_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", CHOICE, CHOICE, {**CHOICE, "id": "q2", "answer": "C"}, ["no"], {"id": "q3"})
    with pytest.raises(DataErrors) as caught:
        read_questions(path, "option")
    said = str(caught.value).splitlines()
    for line, words in ((2, "'q1' already stands in line 1"), (3, "C"), (4, "expected an object"), (5, "missing")):
        assert any(f"q.jsonl:{line}:" in one and words in one for one in said), said
    with pytest.raises(UserError, match="no number"):
        read_questions(write(tmp_path / "n.jsonl", {"id": "n", "question": "?", "answer": "seven"}), "number")
