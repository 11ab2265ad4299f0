"""AI feedback: candidates, replies read strictly, swapped orders, agreement of judges, position bias."""

import math
from collections import Counter
from pathlib import Path

import pytest
from second_text_fixtures import answer, asked, judged, rows_of, shared_questions, write_jsonl

from data_tools.pairs import judge
from data_tools.pairs.judge_votes import ReplyForm, decide, vote_of
from data_tools.pairs.record import read_pairs

QUESTIONS = [{"id": "q1", "question": "Red?", "options": {"A": "yes", "B": "no"}, "gold": "A"}]
PROMPTS = '[judge]\ntext = "{question} 1: {first} 2: {second}"\n'
ANSWERS = ["The answer is A.", "The answer is B.", "The answer is A.", "So A.", " "]


def ask(folder: Path, answers: list[str], *more: str) -> Path:
    questions = write_jsonl(folder / "Q.jsonl", QUESTIONS)
    (folder / "P.toml").write_text(PROMPTS, encoding="utf-8")
    requests = asked(folder / "R.jsonl", QUESTIONS, system="Short.")
    samples = answer(requests, folder / "S.jsonl", {"q1": answers})
    verdicts = judged(questions, samples, folder / "V.jsonl")
    out = folder / "JR.jsonl"
    files = ["--requests", requests, "--samples", samples, "--verdicts", verdicts, "--prompts", folder / "P.toml"]
    common = ["requests", "--questions", questions, "--kind", "option", *files, "--out", out]
    assert judge.main([*map(str, common), *more]) == 0
    return out


def build(requests: Path, samples: list[Path], *more: str, code: int = 0) -> Path:
    out = requests.parent / "pairs.jsonl"
    files = ["--requests", str(requests), "--samples", *map(str, samples), "--out", str(out)]
    assert judge.main(["pairs", *files, *more]) == code
    return out


def test_both_orders_of_different_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 4 answers that say something there are 6 pairs; 0 and 2 are the same text."""
    requests = ask(tmp_path, ANSWERS, "--pairs-per-question", "9")
    rows = rows_of(requests)
    assert [row["id"] for row in rows[:4]] == ["q1#0-1#12", "q1#0-1#21", "q1#0-3#12", "q1#0-3#21"]
    assert [row["prompt"][0]["content"] for row in rows[:2]] == [
        "Red? 1: The answer is A. 2: The answer is B.",
        "Red? 1: The answer is B. 2: The answer is A.",
    ]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("1 questions, 5 answers: 5 candidate pairs, 10 requests in ")
    assert said.endswith("dropped: 1 empty answers, 1 pairs of equal answers")
    capped = ask(tmp_path, ANSWERS, "--pairs-per-question", "2", "--seed", "1").read_bytes()
    assert "3 pairs over --pairs-per-question" in capsys.readouterr().out
    assert ask(tmp_path, ANSWERS, "--pairs-per-question", "2", "--seed", "1").read_bytes() == capped
    seeds = {ask(tmp_path, ANSWERS, "--pairs-per-question", "2", "--seed", str(seed)).read_bytes() for seed in range(9)}
    assert len(seeds) > 1


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Verdict: A", "A"),
        ("Both are fine.\n**Verdict: B**\n", "B"),
        ("verdict: [[a]]", None),
        ("Verdict: (B).", "B"),
        ("Verdict：A。", "A"),
        ("Verdict: tie", "tie"),
        ("B", "B"),
        ("TIE", "tie"),
        ("<think>Verdict: A</think>Verdict: B", "B"),
        ("<think>Verdict: A", None),
        ("Verdict: A\nBut B is shorter.", None),
        ("Verdict: A or B", None),
        ("Verdict: C", None),
        ("I prefer A", None),
        ("One\nA", None),
        ("", None),
    ],
)
def test_replies_are_read_strictly(text: str, choice: str | None) -> None:
    assert ReplyForm().read(text) == choice


def test_replies_in_other_languages() -> None:
    assert ReplyForm("判定", "平局").read("两者都提到发热。\n判定：B") == "B"
    assert ReplyForm("判定", "平局").read("判定：平局") == "tie"
    assert ReplyForm("رأی", "مساوی").read("هر دو درست‌اند.\nرأی: مساوی") == "tie"
    assert ReplyForm("判定", "平局").read("Verdict: B") is None


def test_votes_and_decisions_by_hand() -> None:
    assert [vote_of("A", "B"), vote_of("B", "A"), vote_of("tie", "tie")] == ["one", "two", "tie"]
    assert [vote_of("A", "A"), vote_of("B", "B"), vote_of("A", "tie"), vote_of("A", None)] == ["split"] * 3 + ["unread"]
    assert decide(["one", "one", "split"], judges=3, agree=2).winner == 1
    assert decide(["two", "two", "one"], judges=3, agree=2).shares == (1 / 3, 2 / 3)
    assert decide(["one", "tie", "tie"], judges=3, agree=2).why == "too few judges agree"
    assert decide(["one", "two", "two", "one"], judges=4, agree=2).why == "judges disagree"
    assert decide(["split", "unread"], judges=2, agree=1).why == "swayed by the order"
    assert decide(["unread"], judges=1, agree=1).why == "no reply to read"


def test_pairs_need_both_orders_and_enough_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers 0 (right), 1 (wrong), 2 (right). Judge x is steady; y likes the first place; z prefers the wrong one."""
    answers = ["The answer is A.", "The answer is B.", "So the answer is A."]
    requests = ask(tmp_path, answers)
    says = {
        "x": {"0-1": "AB", "0-2": "tt", "1-2": "BA"},
        "y": {"0-1": "AB", "0-2": "AA", "1-2": "AA"},
        "z": {"0-1": "BA", "0-2": "AB", "1-2": "AB"},
    }
    samples = []
    for name, by_pair in says.items():
        replies = {
            f"q1#{pair}#{order}": f"Because.\nVerdict: {'tie' if said == 't' else said}"
            for pair, both in by_pair.items()
            for order, said in zip(("12", "21"), both, strict=True)
        }
        samples.append(answer(requests, tmp_path / f"{name}.jsonl", replies, model=name))
    capsys.readouterr()
    (pair,) = read_pairs(build(requests, samples, "--agree", "2", "--round", "1"))
    lines = capsys.readouterr().out.splitlines()
    assert (pair["id"], pair["chosen"][0]["content"]) == ("q1#0-1", answers[0])
    assert pair["rejected"][0]["content"] == answers[1]
    assert pair["prompt"] == rows_of(tmp_path / "R.jsonl")[0]["prompt"]
    assert math.isclose(pair["scores"]["chosen"], 2 / 3) and math.isclose(pair["scores"]["rejected"], 1 / 3)
    assert pair["verified"] == {"chosen": "correct", "rejected": "wrong"}
    assert pair["made_by"]["chosen"]["preferred_by"] == ["x (x.jsonl, sample 0)", "y (y.jsonl, sample 0)"]
    assert (pair["made_by"]["rejected"]["sample"], pair["round"], pair["source"]) == ("q1:1", 1, "judge")
    wanted = "judge y (y.jsonl, sample 0): first place chosen in 83.3% of 6 decided replies, 0 ties, 0 unread"
    assert lines[1].startswith(wanted)
    assert lines[1].endswith("; 1 of 3 pairs the same in both orders")
    assert lines[0].startswith("judge x (x.jsonl, sample 0): first place chosen in 50.0% of 4 decided replies, 2 ties")
    assert lines[-1].startswith("3 candidate pairs, 3 judges, 2 must agree: 1 pairs in ")
    assert lines[-1].endswith("dropped: 1 too few judges agree, 1 judges disagree")
    (pair,) = rows_of(build(requests, samples[2:], "--agree", "1"))[:1]
    assert pair["verified"] == {"chosen": "wrong", "rejected": "correct"}
    assert "(2 prefer a wrong answer to a correct one)" in capsys.readouterr().out
    assert rows_of(build(requests, samples)) == []  # all three never agree


def test_samples_of_one_file_are_judges_too_and_faults_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = ask(tmp_path, ["The answer is A.", "The answer is B."])
    replies = {"q1#0-1#12": ["A", "A", "Verdict: A"], "q1#0-1#21": ["B", "B"]}
    samples = answer(requests, tmp_path / "J.jsonl", replies)
    (pair,) = rows_of(build(requests, [samples], "--agree", "2"))
    assert math.isclose(pair["scores"]["chosen"], 2 / 3)  # the third has no reply to the other order
    build(requests, [samples], "--agree", "4", code=2)
    assert "--agree 4: there are 3 judges in" in capsys.readouterr().err
    build(tmp_path / "R.jsonl", [samples], code=2)
    assert "R.jsonl:1: field 'student': missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("medqa", ["Bands in the fluid. The answer is C.", "The answer is A."]),
        ("cmexam", ["全文共24条。答案是D。", "答案是A。"]),
        ("medmcqa_fa", ["تخم هیمنولپیس رشته دارد. پاسخ گزینه د است.", "پاسخ گزینه الف است."]),
    ],
)
def test_real_questions_in_three_languages(shared_dir: Path, tmp_path: Path, name: str, answers: list[str]) -> None:
    own = shared_questions(shared_dir, name, 1)
    questions = write_jsonl(tmp_path / "Q.jsonl", own)
    (tmp_path / "P.toml").write_text(PROMPTS, encoding="utf-8")
    requests = asked(tmp_path / "R.jsonl", own)
    samples = answer(requests, tmp_path / "S.jsonl", {own[0]["id"]: answers})
    out = tmp_path / "JR.jsonl"
    files = ["--requests", requests, "--samples", samples, "--prompts", tmp_path / "P.toml", "--out", out]
    assert judge.main([*map(str, ["requests", "--questions", questions, "--kind", "option", *files])]) == 0
    rows = rows_of(out)
    assert Counter(row["question_id"] for row in rows) == {own[0]["id"]: 2}
    replies = {rows[0]["id"]: "…\nVerdict: A", rows[1]["id"]: "…\nVerdict: B"}
    (pair,) = rows_of(build(out, [answer(out, tmp_path / "J.jsonl", replies)]))
    assert [pair[side][0]["content"] for side in ("chosen", "rejected")] == answers
    assert pair["verified"] == {"chosen": None, "rejected": None}
