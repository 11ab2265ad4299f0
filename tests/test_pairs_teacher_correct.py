"""Pairs of a student's wrong answer and a teacher's: which answers are asked about, which replies are used."""

from pathlib import Path

import pytest
from second_text_fixtures import answer, asked, judged, rows_of, shared_questions, write_jsonl

from data_tools.pairs import teacher_correct
from data_tools.pairs.record import read_pairs

QUESTIONS = [
    {"id": "q1", "question": "Red?", "options": {"A": "yes", "B": "no"}, "gold": "A", "explanation": None},
    {"id": "q2", "question": "Green?", "options": {"A": "yes", "B": "no"}, "gold": "B", "explanation": "Look."},
    {"id": "q3", "question": "Blue?", "options": {"A": "yes", "B": "no"}, "gold": "A"},
]
PROMPTS = """
[teacher_correct]
system = "You teach."
text = "{question}|{options}|{gold}|{gold_text}|{explanation}|{student}"
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """q1: wrong, wrong; q2: unreadable; q3: right, empty."""
    questions = write_jsonl(tmp_path / "Q.jsonl", QUESTIONS)
    requests = asked(tmp_path / "R.jsonl", QUESTIONS, system="Be short.")
    texts = {
        "q1": ["The answer is B.", "I choose B."],
        "q2": "Who knows?",
        "q3": ["The answer is A.", " "],
    }
    samples = answer(requests, tmp_path / "S.jsonl", texts)
    verdicts = judged(questions, samples, tmp_path / "V.jsonl")
    (tmp_path / "P.toml").write_text(PROMPTS, encoding="utf-8")
    return {"Q": questions, "R": requests, "S": samples, "V": verdicts, "P": tmp_path / "P.toml"}


def ask(files: dict[str, Path], *more: str) -> Path:
    """The requests to the teacher."""
    out = files["Q"].parent / "TR.jsonl"
    named = ["--questions", files["Q"], "--requests", files["R"], "--samples", files["S"], "--verdicts", files["V"]]
    common = ["requests", "--kind", "option", *map(str, named), "--prompts", str(files["P"]), "--out", str(out)]
    assert teacher_correct.main([*common, *more]) == 0
    return out


def build(files: dict[str, Path], requests: Path, samples: Path, *more: str, judge: bool = True) -> Path:
    out = files["Q"].parent / "pairs.jsonl"
    verdicts = judged(files["Q"], samples, files["Q"].parent / "TV.jsonl")
    own = ["--verdicts", str(verdicts)] if judge else []
    files_ = ["--requests", str(requests), "--samples", str(samples), *own, "--out", str(out)]
    assert teacher_correct.main(["pairs", *files_, *more]) == 0
    return out


def test_wrong_answers_are_asked_about_with_all_that_is_known(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(ask(files))
    assert [row["id"] for row in rows] == ["q1#0#t", "q2#0#t"]
    turns = [row["prompt"] for row in rows]
    assert turns[0][0] == {"role": "system", "content": "You teach."}
    assert turns[0][1]["content"] == "Red?|A. yes\nB. no|A|yes||The answer is B."
    assert turns[1][1]["content"] == "Green?|A. yes\nB. no|B|no|Look.|Who knows?"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("3 questions, 5 answers: 2 requests in ")
    assert said.endswith("; dropped: 1 over --per-question, 1 correct, 1 empty")


def test_unreadable_answers_and_further_samples_are_a_choice(files: dict[str, Path]) -> None:
    assert [row["id"] for row in rows_of(ask(files, "--invalid", "drop"))] == ["q1#0#t"]
    assert [row["id"] for row in rows_of(ask(files, "--per-question", "2"))] == ["q1#0#t", "q1#1#t", "q2#0#t"]


def test_pairs_have_the_students_prompt_and_the_first_reply_that_may_be_used(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = ask(files, "--per-question", "2")
    replies = {
        "q1#0#t": ["Your answer is wrong. The answer is A.", "Seen. The Answer is A.", "Also A: yes."],
        "q1#1#t": ["The answer is B.", "  "],
        "q2#0#t": "The answer is B.",
    }
    samples = answer(requests, tmp_path / "TS.jsonl", replies, model="teacher", cut=["q2#0#t"])
    pairs = read_pairs(build(files, requests, samples, "--round", "3"))
    said = capsys.readouterr().out.splitlines()
    assert [pair["id"] for pair in pairs] == ["q1#0#t#1"]
    (pair,) = pairs
    assert pair["prompt"] == rows_of(files["R"])[0]["prompt"]
    assert pair["chosen"] == [{"role": "assistant", "content": "Seen. The Answer is A."}]  # its case is kept
    assert pair["rejected"] == [{"role": "assistant", "content": "The answer is B."}]
    assert pair["verified"] == {"chosen": "correct", "rejected": "wrong"}
    assert (pair["source"], pair["question_id"], pair["round"]) == ("teacher_correct", "q1", 3)
    assert pair["made_by"]["chosen"]["model"] == "teacher"
    assert pair["made_by"]["rejected"] == {"model": "student", "settings_digest": "0" * 16, "sample": "q1:0"}
    assert said[-2] == "phrases found: 'your answer' 1"
    assert said[-1].startswith("3 requests (0 unanswered), 6 answers: 1 pairs in ")
    assert said[-1].endswith("dropped: 1 reads as a correction, 1 not needed, 1 judged wrong, 1 empty, 1 cut off")


def test_unverified_replies_are_taken_on_request_only(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = ask(files)
    samples = answer(requests, tmp_path / "TS.jsonl", {"q1#0#t": "I choose B."}, model="teacher")
    assert rows_of(build(files, requests, samples)) == []
    noted = rows_of(build(files, requests, samples, "--verified", "note"))
    assert [pair["verified"] for pair in noted] == [{"chosen": "wrong", "rejected": "wrong"}]
    unjudged = rows_of(build(files, requests, samples, "--verified", "note", judge=False))
    assert [pair["verified"] for pair in unjudged] == [{"chosen": None, "rejected": "wrong"}]
    capsys.readouterr()
    paths = ["--requests", str(requests), "--samples", str(samples), "--out", str(tmp_path / "x.jsonl")]
    assert teacher_correct.main(["pairs", *paths]) == 2
    assert capsys.readouterr().err.startswith("error: --verified require needs --verdicts")


def test_the_same_bytes_again_and_one_line_for_the_users_faults(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = ask(files)
    first = requests.read_bytes()
    assert ask(files).read_bytes() == first
    capsys.readouterr()
    paths = ["--requests", str(files["R"]), "--samples", str(files["S"]), "--out", str(tmp_path / "x.jsonl")]
    assert teacher_correct.main(["pairs", "--verified", "note", *paths]) == 2
    error = capsys.readouterr().err
    assert "R.jsonl:1: field 'student': missing: these are no requests that this command's own" in error
    assert not (tmp_path / "x.jsonl").exists()


REAL = {
    "medqa": (
        "The patient has signs of demyelination. The answer is A.",
        "Optic and spinal signs that come and go point to multiple sclerosis; oligoclonal bands support it. "
        "The answer is C.",
        "Based on the feedback, bands in the fluid support it. The answer is C.",
    ),
    "cmexam": (
        "《献血法》的条文数目记得不清。答案是A。",
        "《献血法》自1998年10月1日起施行,全文共24条。答案是D。",
        "你的答案有误,《献血法》共24条。答案是D。",
    ),
    "medmcqa_fa": (
        "تخم تنیا رشته ندارد، اما به نظر می‌رسد پاسخ گزینه الف است.",
        "تخم هیمنولپیس نانا میان دو غشا رشته‌های قطبی دارد. پاسخ گزینه د است.",
        "استدلال دانشجو درست نیست؛ تخم هیمنولپیس نانا رشته قطبی دارد. پاسخ گزینه د است.",
    ),
}


@pytest.mark.parametrize("name", list(REAL))
def test_real_questions_in_three_languages(shared_dir: Path, tmp_path: Path, name: str) -> None:
    own = shared_questions(shared_dir, name, 1)
    questions = write_jsonl(tmp_path / "Q.jsonl", own)
    requests = asked(tmp_path / "R.jsonl", own)
    wrong, right, revealing = REAL[name]
    samples = answer(requests, tmp_path / "S.jsonl", {own[0]["id"]: wrong})
    verdicts = judged(questions, samples, tmp_path / "V.jsonl")
    (tmp_path / "P.toml").write_text(PROMPTS, encoding="utf-8")
    files = {"Q": questions, "R": requests, "S": samples, "V": verdicts, "P": tmp_path / "P.toml"}
    asked_teacher = ask(files)
    replies = {f"{own[0]['id']}#0#t": [revealing, right]}
    (pair,) = rows_of(build(files, asked_teacher, answer(asked_teacher, tmp_path / "TS.jsonl", replies)))
    assert [pair[side][0]["content"] for side in ("chosen", "rejected")] == [right, wrong]
    assert pair["verified"] == {"chosen": "correct", "rejected": "wrong"}
