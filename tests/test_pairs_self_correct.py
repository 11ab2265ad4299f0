"""Pairs of an error and its verified fix: units, step labels, who corrected and with what hint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from second_text_fixtures import answer, asked, judged, rows_of, shared_questions, write_jsonl

from data_tools.pairs import self_correct
from data_tools.pairs.correction_units import Parts, StepCut, after_shared_steps, after_wrong_step, answer_part
from data_tools.pairs.record import read_pairs
from data_tools.steps import compiled

QUESTIONS = [
    {"id": "q1", "question": "2 bags of 3 apples and 4 more?", "gold": "10"},
    {"id": "q2", "question": "5 less 1?", "gold": "4"},
]
ERROR = "2 x 3 = 6\n6 + 4 = 11\nThe answer is 11."
FIX = "2 x 3 = 6\n6 + 4 = 10\nThe answer is 10."
PROMPTS = """
[self_correct]
text = "{question} {student}"
[self_correct_step]
text = "{question} {correct_steps}| wrong: {wrong_step}| gold {gold}"
[so_far]
text = "{prompt}\\nSo far:\\n{correct_steps}"
"""


class Case:
    """One folder of files of kind number."""

    def __init__(self, folder: Path, texts: Mapping[str, str | Sequence[str]], prompts: str = PROMPTS) -> None:
        self.folder = folder
        self.questions = write_jsonl(folder / "Q.jsonl", QUESTIONS)
        self.prompts = folder / "P.toml"
        self.prompts.write_text(prompts, encoding="utf-8")
        self.first = asked(folder / "R.jsonl", QUESTIONS, system="Count.")
        self.samples = answer(self.first, folder / "S.jsonl", texts)
        self.verdicts = judged(self.questions, self.samples, folder / "V.jsonl", "number")

    def ask(self, *more: str, code: int = 0) -> Path:
        out = self.folder / "CR.jsonl"
        files = ["--requests", self.first, "--samples", self.samples, "--verdicts", self.verdicts]
        common = ["--questions", self.questions, "--kind", "number", *files, "--prompts", self.prompts, "--out", out]
        assert self_correct.main(["requests", *map(str, common), *more]) == code
        return out

    def build(self, requests: Path, texts: Mapping[str, Any], *more: str, code: int = 0, **how: Any) -> Path:
        samples = answer(requests, self.folder / "CS.jsonl", texts, **how)
        verdicts = judged(self.questions, samples, self.folder / "CV.jsonl", "number")
        out = self.folder / "pairs.jsonl"
        files = ["--requests", requests, "--samples", samples, "--verdicts", verdicts, "--out", out]
        assert self_correct.main(["pairs", *map(str, files), *more]) == code
        return out


def texts_of(pair: Mapping[str, Any]) -> tuple[str, str]:
    return pair["chosen"][0]["content"], pair["rejected"][0]["content"]


def test_only_verified_fixes_and_what_the_corrector_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path, {"q1": ERROR, "q2": "The answer is 4."})
    requests = case.ask("--source", "self", "--tries", "3")
    (row,) = rows_of(requests)
    assert (row["id"], row["source"], row["hint"], row["settings"]) == ("q1#0#s", "self", "none", {"n": 3})
    assert row["prompt"] == [{"role": "user", "content": f"{QUESTIONS[0]['question']} {ERROR}"}]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith("(source self, hint none); dropped: 1 correct")
    fixes = {"q1#0#s": ["The answer is 12.", "I made a mistake. The answer is 10.", FIX, "6 + 4. The answer is 10."]}
    (pair,) = read_pairs(case.build(requests, fixes, "--round", "1"))
    assert texts_of(pair) == (FIX, ERROR)
    assert pair["prompt"] == rows_of(case.first)[0]["prompt"]
    assert (pair["id"], pair["source"], pair["round"]) == ("q1#0#s#2", "self_correct", 1)
    assert pair["verified"] == {"chosen": "correct", "rejected": "wrong"}
    who = pair["made_by"]["chosen"]
    assert (who["model"], who["source"], who["hint"], who["unit"]) == ("student", "self", "none", "trajectory")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("1 errors (1 with a pair), 4 fixes: 1 pairs in ")
    assert said.endswith("dropped: 1 judged wrong, 1 reads as a correction, 1 not needed")
    assert [pair["id"][-1] for pair in rows_of(case.build(requests, fixes, "--per-error", "5"))] == ["2", "3"]


def test_self_means_the_model_that_erred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path, {"q1": ERROR})
    case.build(case.ask("--source", "self"), {"q1#0#s": FIX}, model="teacher", code=2)
    assert "the fix of 'q1#0#s' is by 'teacher', the error by 'student'" in capsys.readouterr().err
    (pair,) = rows_of(case.build(case.ask("--source", "teacher"), {"q1#0#s": FIX}, model="teacher"))
    assert pair["made_by"]["chosen"]["source"] == "teacher"


def test_a_template_that_shows_the_known_answer_is_a_hint(tmp_path: Path) -> None:
    case = Case(tmp_path, {"q1": ERROR}, prompts='[self_correct]\nsystem = "It is {gold}."\ntext = "{question}"\n')
    (row,) = rows_of(case.ask("--source", "self"))
    assert row["hint"] == "gold"
    assert row["prompt"][0] == {"role": "system", "content": "It is 10."}
    assert "settings" not in row


def test_the_first_wrong_step_by_the_longest_shared_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, {"q1": ERROR, "q2": "5 - 1 = 3\nThe answer is 3."})
    requests = case.ask("--source", "self")
    fixes = {"q1#0#s": FIX, "q2#0#s": "One less than 5.\nThe answer is 4."}
    (pair,) = read_pairs(case.build(requests, fixes, "--unit", "first_wrong_step"))
    assert texts_of(pair) == (FIX, ERROR)  # both begin with the shared step
    assert capsys.readouterr().out.splitlines()[-1].endswith("dropped: 1 without a shared first step")
    carry = ["--unit", "first_wrong_step", "--carry", "user", "--prompts", str(case.prompts)]
    (pair,) = read_pairs(case.build(requests, fixes, *carry))
    assert texts_of(pair) == ("6 + 4 = 10\nThe answer is 10.", "6 + 4 = 11\nThe answer is 11.")
    assert pair["prompt"] == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": f"{QUESTIONS[0]['question']}\nSo far:\n2 x 3 = 6\n"},
    ]


def test_the_first_wrong_step_by_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer's line is no step. q2's first step is wrong: nothing comes before it."""
    case = Case(tmp_path, {"q1": ERROR, "q2": ["5 - 1 = 3\nThe answer is 3.", "5 - 1 = 4\nThe answer is 5."]})
    rows = [
        {"id": "q1", "sample": 0, "labels": [1, 0]},
        {"id": "q2#0", "steps": ["5 - 1 = 3\n", "The answer is 3."], "hard": [0, 0]},
        {"id": "q2#1", "steps": ["5 - 1 = 4\n", "The answer is 5."], "hard": [1, 1]},
    ]
    labels = write_jsonl(tmp_path / "L.jsonl", rows)
    named = ["--labels", str(labels), "--per-question", "2"]
    requests = case.ask("--source", "teacher", *named)
    assert capsys.readouterr().out.splitlines()[-1].endswith("hint gold); dropped: 1 without a wrong step")
    first, second = rows_of(requests)
    wanted = f"{QUESTIONS[0]['question']} 2 x 3 = 6\n| wrong: 6 + 4 = 11\n| gold 10"
    assert first["prompt"][0]["content"] == wanted
    assert second["correct_steps"] == ""
    fixes = {"q1#0#s": "6 + 4 = 10\nThe answer is 10.", "q2#0#s": "5 - 1 = 4\nThe answer is 4."}
    unit = ["--unit", "first_wrong_step"]
    assert [texts_of(pair) for pair in rows_of(case.build(requests, fixes, *unit))] == [
        (FIX, ERROR),
        ("5 - 1 = 4\nThe answer is 4.", "5 - 1 = 3\nThe answer is 3."),
    ]
    carry = [*unit, "--carry", "user", "--prompts", str(case.prompts)]
    pairs = rows_of(case.build(requests, fixes | {"q1#0#s": FIX}, *carry))  # this fix repeats the correct step
    assert texts_of(pairs[0]) == ("6 + 4 = 10\nThe answer is 10.", "6 + 4 = 11\nThe answer is 11.")
    assert pairs[1]["prompt"] == rows_of(case.first)[1]["prompt"]
    write_jsonl(labels, [{"id": "q1", "sample": 0, "labels": [1, 1, 0]}])
    case.ask("--source", "teacher", *named, code=2)
    error = capsys.readouterr().err
    assert "L.jsonl:1: field 'labels': 3 labels for the 2 steps of the answer 'q1#0'" in error


def test_the_answer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path, {"q1": ERROR, "q2": "<think>5 - 1</think>\n<answer>3</answer>"})
    requests = case.ask("--source", "self")
    fixes = {"q1#0#s": FIX, "q2#0#s": "<think>5 - 1 is 4</think>\n<answer> 4 </answer>"}
    pairs = read_pairs(case.build(requests, fixes, "--unit", "answer"))
    assert [texts_of(pair) for pair in pairs] == [("The answer is 10.", "The answer is 11."), ("4", "3")]
    assert pairs[0]["prompt"] == rows_of(case.first)[0]["prompt"]
    closing = ["--unit", "answer", "--closing", r"\d+ \+ 4 ="]
    (pair,) = rows_of(case.build(requests, fixes, *closing))
    assert texts_of(pair) == ("6 + 4 = 10\nThe answer is 10.", "6 + 4 = 11\nThe answer is 11.")
    assert capsys.readouterr().out.splitlines()[-1].endswith("dropped: 1 without an answer part")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("So it is warm. The answer is (B).", "The answer is (B)."),
        ("因为发热。答案是B。", "答案是B。"),
        ("تب دارد. پاسخ گزینه ب است.", "پاسخ گزینه ب است."),
        ("<think>B or C?", None),
        ("It is warm.", None),
    ],
)
def test_answer_parts(text: str, part: str | None) -> None:
    assert answer_part(text, None) == part


def test_parts_by_hand() -> None:
    lines = StepCut("line")
    assert after_shared_steps("a\nb\nc", "a\nb\nd", lines) == Parts("d", "c", "a\nb\n")
    assert after_shared_steps("a\nb", "x\nb", lines) is None
    assert after_shared_steps("a\nb\n", "a\nb\nc", lines) is None  # the fix only goes on
    assert after_shared_steps("a; b; c", "a; d", StepCut("regex", compiled("; ", "x"))) == Parts("d", "b; c", "a; ")
    assert after_wrong_step("a\nb", "c", "a\n") == Parts("c", "b", "a\n")
    assert after_wrong_step("a\nb", "\na\nc", "a\n") == Parts("c", "b", "a\n")


REAL = {
    "medqa": ("Weakness comes and goes.\nThe answer is A.", "Weakness comes and goes.\nThe answer is C."),
    "cmexam": ("《献血法》于1998年施行。\n答案是A。", "《献血法》于1998年施行。\n答案是D。"),
    "medmcqa_fa": ("رشته‌های قطبی مهم‌اند.\nپاسخ گزینه الف است.", "رشته‌های قطبی مهم‌اند.\nپاسخ گزینه د است."),
}


@pytest.mark.parametrize("name", list(REAL))
def test_real_questions_in_three_languages(shared_dir: Path, tmp_path: Path, name: str) -> None:
    own = shared_questions(shared_dir, name, 1)
    questions = write_jsonl(tmp_path / "Q.jsonl", own)
    error, fix = REAL[name]
    first = asked(tmp_path / "R.jsonl", own)
    samples = answer(first, tmp_path / "S.jsonl", {own[0]["id"]: error})
    verdicts = judged(questions, samples, tmp_path / "V.jsonl")
    (tmp_path / "P.toml").write_text(PROMPTS, encoding="utf-8")
    requests = tmp_path / "CR.jsonl"
    files = ["--requests", first, "--samples", samples, "--verdicts", verdicts, "--prompts", tmp_path / "P.toml"]
    common = ["--questions", questions, "--kind", "option", *files, "--source", "self", "--out", requests]
    assert self_correct.main(["requests", *map(str, common)]) == 0
    fixes = answer(requests, tmp_path / "CS.jsonl", {f"{own[0]['id']}#0#s": fix})
    fixed = judged(questions, fixes, tmp_path / "CV.jsonl")
    out = tmp_path / "pairs.jsonl"
    for unit, wanted in (("trajectory", (fix, error)), ("first_wrong_step", (fix, error)), ("answer", None)):
        files = ["--requests", requests, "--samples", fixes, "--verdicts", fixed, "--unit", unit, "--out", out]
        assert self_correct.main(["pairs", *map(str, files)]) == 0
        (pair,) = rows_of(out)
        assert texts_of(pair) == (wanted or (fix.split("\n")[1], error.split("\n")[1]))
