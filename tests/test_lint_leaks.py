"""Answers given away by prompts and critiques: planted ones are found, what only looks like one is not."""

import json
from pathlib import Path
from typing import Any

import pytest
from eval_fixtures import write_rows
from lint_fixtures import check, persian_questions, rows_of, run_lint, said, with_text

from data_tools import lint
from data_tools.lint_leaks import Leaks
from data_tools.lint_rows import read_rows
from data_tools.questions import read_questions

DRUGS = ["aspirin", "warfarin", "heparin", "alteplase"]
GOLD = "BCADBCAD"


def asked(number: int, hint: str = "") -> str:
    lines = "\n".join(f"{label}. {drug}" for label, drug in zip("ABCD", DRUGS, strict=True))
    return f"Which drug is given in case {number} of stroke?\n{lines}\n{hint}".strip()


def leaking(
    tmp_path: Path, prompts: list[str], *, kind: str = "option", questions: list[Any] | None = None
) -> set[int]:
    """Numbers of the prompts that are found."""
    options = dict(zip("ABCD", DRUGS, strict=True))
    if questions is None:
        stems = [f"Which drug is given in case {i} of stroke?" for i in range(len(prompts))]
        questions = [{"id": f"q{i}", "question": s, "options": options, "gold": GOLD[i]} for i, s in enumerate(stems)]
    rows = [{"id": f"q{i}#0", "prompt": prompt, "chosen": "x", "rejected": "y"} for i, prompt in enumerate(prompts)]
    leaks = Leaks(read_questions(write_rows(tmp_path / "q.jsonl", questions), kind))  # type: ignore[arg-type]
    found = leaks.prompts(read_rows(write_rows(tmp_path / "p.jsonl", rows)), 0.01)
    assert found.more["no_question"] == 0
    return {int(name[1:].split("#")[0]) for name in found.more["why"]}


@pytest.mark.parametrize(
    "hint",
    [
        "The answer is {gold}.",
        "Hint: {text}",
        "{gold}",
        "[correct: {gold}]",
        "پاسخ صحیح: {gold}",
        "答案是{gold}",
        "({text} is the right answer: {gold})",
    ],
)
def test_a_stated_answer_is_found(tmp_path: Path, hint: str) -> None:
    told = [hint.format(gold=GOLD[i], text=DRUGS["ABCD".index(GOLD[i])]) if i < 5 else "" for i in range(8)]
    assert leaking(tmp_path, [asked(i, told[i]) for i in range(8)]) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "hint",
    ["Finish with a line like: The answer is A", "Is the answer B?", "Give the right answer as a letter, A to D."],
)
def test_an_example_of_the_format_is_no_leak(tmp_path: Path, hint: str) -> None:
    assert leaking(tmp_path, [asked(i, hint) for i in range(8)]) == set()


def test_a_mark_on_the_right_option_is_found(tmp_path: Path) -> None:
    prompts = [asked(i) for i in range(8)]
    right = f"{GOLD[2]}. {DRUGS['ABCD'.index(GOLD[2])]}"
    prompts[2] = prompts[2].replace(right, f"**{right}**")
    wrong = "A. aspirin"
    prompts[3] = prompts[3].replace(wrong, f"{wrong} (correct)")  # a mark on a wrong one gives nothing away
    assert leaking(tmp_path, prompts) == {2}


def test_numbers(tmp_path: Path) -> None:
    """The right number among the question's numbers is no leak; said to be the answer it is."""
    stem = "Ann has 18 apples and buys {} more, then gives away as many. How many has she? "
    hints = ["", "The answer is 18.", "#### 18", "She has 18 apples at the end of the day.", "Write: #### 7"]
    questions = [{"id": f"q{i}", "question": stem.format(i + 2), "gold": "18"} for i in range(5)]
    prompts = [stem.format(i + 2) + hint for i, hint in enumerate(hints)]
    assert leaking(tmp_path, prompts, kind="number", questions=questions) == {1, 2}


def test_critiques(tmp_path: Path) -> None:
    options = dict(zip("ABCD", DRUGS, strict=True))
    questions = [{"id": f"q{i}", "question": f"Case {i}: 24 h ago?", "options": options, "gold": "B"} for i in range(6)]
    texts = [
        "You chose A. Think about bleeding again.",
        "Option B deserves a look.",
        "Why not warfarin?",
        "The answer should be B.",
        "The mechanism is described wrongly in step 2.",
        "Neither C nor D explains this, and A is wrong too.",  # what is left is B
    ]
    critiques = write_rows(tmp_path / "c.jsonl", [{"id": f"q{i}#r1", "text": t} for i, t in enumerate(texts)])
    found = Leaks(read_questions(write_rows(tmp_path / "q.jsonl", questions), "option")).critiques(critiques, 0.01)
    assert list(found.ids) == ["q1#r1", "q2#r1", "q3#r1", "q5#r1"]
    assert "4 of 6 critiques of c.jsonl give the answer away (1 state it, 3 name it)" in found.text
    numbers = [
        {"id": "n", "question": "24 apples in 2 bags?", "gold": "24"},
        {"id": "m", "question": "?", "gold": "36"},
    ]
    told = [
        {"id": "n#0", "critique": "Did you use the 24?"},  # the question has it
        {"id": "n#1", "critique": "No: the result is 24."},
        {"id": "m#0", "critique": "Step 2 should give 36, not 30."},
        {"id": "m#1", "critique": "Step 2 is wrong: 6 times 6."},
    ]
    path = write_rows(tmp_path / "n.jsonl", told)
    found = Leaks(read_questions(write_rows(tmp_path / "q.jsonl", numbers), "number")).critiques(path, 0.01)
    assert list(found.ids) == ["n#1", "m#0"]


def test_wrong_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_rows(tmp_path / "p.jsonl", [{"id": "z", "prompt": "p", "chosen": "x", "rejected": "y"}])
    questions = write_rows(tmp_path / "q.jsonl", [{"id": "a", "question": "?", "gold": "4"}])
    known = [str(pairs), "--questions", str(questions), "--kind", "number"]
    assert lint.main(known) == 2
    assert "no pair is of a question of" in capsys.readouterr().err
    critiques = write_rows(tmp_path / "c.jsonl", [{"id": "b", "text": "no"}])
    write_rows(pairs, [{"id": "a#0", "prompt": "p", "chosen": "x", "rejected": "y"}])
    assert lint.main([*known, "--critiques", str(critiques)]) == 2
    assert "c.jsonl:1: field 'id': 'b' is of no question of the questions file" in capsys.readouterr().err
    assert lint.main([str(pairs), "--critiques", str(critiques)]) == 2
    assert "--critiques needs --questions" in capsys.readouterr().err


def test_planted_in_real_persian_questions(shared_dir: Path, tmp_path: Path) -> None:
    """Each of four ways of planting in a sixth of the prompts; an example of the format, and nothing, in the others."""
    rows = rows_of(shared_dir / "data" / "pref_fa_med" / "train.jsonl")
    questions = persian_questions(rows)
    planted = []
    for number, (row, own) in enumerate(zip(rows, questions, strict=True)):
        gold, text = own["gold"], own["options"][own["gold"]].strip()
        line = f"[{gold}] : {own['options'][gold]}"
        ways = (
            lambda t, gold=gold: f"{t}\nپاسخ: {gold}",
            lambda t, text=text: f"{t}\nراهنمایی: {text}",
            lambda t, line=line: t.replace(line, f"**{line}** ✓"),
            lambda t, gold=gold: f"{t}\n{gold}",
            lambda t: f"{t}\nمثال قالب: پاسخ: A",
            str,
        )
        planted.append(with_text(row, "prompt", ways[number % 6]))
    path = write_rows(tmp_path / "q.jsonl", questions)
    leaks = Leaks(read_questions(path, "option"))
    clean = leaks.prompts(read_rows(write_rows(tmp_path / "p.jsonl", rows)), 0.01)
    assert clean.value == 0
    found = leaks.prompts(read_rows(write_rows(tmp_path / "p.jsonl", planted)), 0.01)
    # 267 are planted; 3 of them name an option whose text is itself letters or a number, which no rule can read.
    assert found.text.startswith("264 of 399 ")
    code, report = run_lint(tmp_path, planted, "--questions", path, "--kind", "option")
    assert code == 2 and "leak" in report["refused"]
    assert said(planted[0], "prompt").endswith(f"پاسخ: {questions[0]['gold']}")
    assert json.dumps(check(report, "leak")["why"], ensure_ascii=False).count("پاسخ") >= 1
