"""Retries after critiques: who is asked again, what a critique may not say, and which retry becomes a pair."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from second_text_fixtures import answer, asked, judged, rows_of, shared_questions, write_jsonl

from data_tools.pairs import critique_retry
from data_tools.pairs.record import read_pairs

COLOURS = {"A": "red", "B": "green", "C": "blue", "D": "white"}
QUESTIONS = [
    {"id": name, "question": f"{name}?", "options": COLOURS, "gold": gold}
    for name, gold in (("q1", "A"), ("q2", "B"), ("q3", "C"), ("q4", "D"))
]
PROMPTS = """
[critique]
text = "{question} {options} {gold} {student} <{tried}>"
[retry]
text = "{critique} Think again."
[retry_different]
text = "{critique} Choose another option than {tried}."
"""
Texts = Mapping[str, str | Sequence[str]]


class Loop:
    """The files of a loop in one folder: R0, S0, V0 of first answers, C1, CS1 and R1, S1, V1 of turn 1, and so on."""

    def __init__(self, folder: Path, questions: Sequence[Mapping[str, Any]], first: Texts, **more: Any) -> None:
        self.folder = folder
        self.questions = write_jsonl(folder / "Q.jsonl", questions)
        (folder / "P.toml").write_text(PROMPTS, encoding="utf-8")
        requests = asked(folder / "R0.jsonl", questions, system="Be short.")
        self.turns = [self._judged(requests, 0, first, **more)]

    def _judged(self, requests: Path, turn: int, texts: Texts, **more: Any) -> tuple[Path, Path, Path]:
        samples = answer(requests, self.folder / f"S{turn}.jsonl", texts, **more)
        return requests, samples, judged(self.questions, samples, self.folder / f"V{turn}.jsonl")

    def _command(self, name: str, files: Sequence[str | Path], out: str, *more: str) -> Path:
        common = [name, "--questions", str(self.questions), "--kind", "option", *map(str, files)]
        assert critique_retry.main([*common, "--out", str(self.folder / out), *more]) == 0
        return self.folder / out

    def _all(self) -> list[str | Path]:
        requests, samples, verdicts = zip(*self.turns, strict=True)
        return ["--requests", *requests, "--samples", *samples, "--verdicts", *verdicts]

    def critiques(self, *more: str) -> Path:
        prompts = ["--prompts", str(self.folder / "P.toml")]
        return self._command("critique-requests", self._all(), f"C{len(self.turns)}.jsonl", *prompts, *more)

    def retries(self, critiques: Path, texts: Texts, *more: str, **how: Any) -> Path:
        turn = len(self.turns)
        samples = answer(critiques, self.folder / f"CS{turn}.jsonl", texts, model="teacher", **how)
        files = ["--requests", critiques, "--samples", samples, "--prompts", self.folder / "P.toml"]
        return self._command("retry-requests", files, f"R{turn}.jsonl", *more)

    def answered(self, requests: Path, texts: Texts, **more: Any) -> None:
        self.turns.append(self._judged(requests, len(self.turns), texts, **more))

    def pairs(self, *more: str) -> Path:
        return self._command("pairs", self._all(), "pairs.jsonl", *more)


FIRST = {
    "q1": "The answer is B.",
    "q2": "The answer is A.",
    "q3": "The answer is C.",  # right
    "q4": "The answer is A.",
}


def test_two_turns_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """q1 is solved in turn 1, q2 in turn 2, q3 was right at once, q4 stays unsolved."""
    loop = Loop(tmp_path, QUESTIONS, FIRST)
    critiques = loop.critiques()
    assert [row["id"] for row in rows_of(critiques)] == ["q1#0#c1", "q2#0#c1", "q4#0#c1"]
    asked_teacher = rows_of(critiques)[0]["prompt"][0]["content"]
    assert asked_teacher == "q1? A. red\nB. green\nC. blue\nD. white A The answer is B. <B>"
    told = {"q1#0#c1": "Look at it again.", "q2#0#c1": "No reason is given.", "q4#0#c1": "Too fast."}
    retries = loop.retries(critiques, told)
    assert [row["id"] for row in rows_of(retries)] == ["q1#0#r1", "q2#0#r1", "q4#0#r1"]
    first_prompt = rows_of(loop.turns[0][0])[0]["prompt"]
    chat = [*first_prompt, {"role": "assistant", "content": "The answer is B."}]
    assert rows_of(retries)[0]["prompt"] == [*chat, {"role": "user", "content": "Look at it again. Think again."}]
    loop.answered(
        retries, {"q1#0#r1": "The answer is A.", "q2#0#r1": "The answer is C.", "q4#0#r1": "The answer is A."}
    )
    capsys.readouterr()

    critiques = loop.critiques()
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("turn 2: 4 questions, 3 wrong first answers: 2 requests in ")
    assert said.endswith("(1 chose again what was wrong before); dropped: 1 correct, 1 solved in an earlier turn")
    second = rows_of(critiques)
    assert [row["id"] for row in second] == ["q2#0#c2", "q4#0#c2"]
    assert second[0]["prompt"][0]["content"].endswith("B The answer is C. <A, C>")  # the latest answer
    retries = loop.retries(critiques, {"q2#0#c2": "Still none.", "q4#0#c2": "No."}, "--wrong-again", "different")
    turns = rows_of(retries)[0]["prompt"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert turns[-1]["content"] == "Still none. Choose another option than A, C."
    loop.answered(retries, {"q2#0#r2": "The answer is B.", "q4#0#r2": "Who knows?"})
    capsys.readouterr()

    pairs = read_pairs(loop.pairs("--round", "2"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("4 questions, 3 wrong first answers: 2 pairs in ")
    assert said.endswith("; solved: 1 in turn 1, 1 in turn 2; dropped: 1 correct, 1 unsolved")
    assert [pair["id"] for pair in pairs] == ["q1#0#r1#0", "q2#0#r2#0"]
    later = pairs[1]
    assert later["prompt"] == rows_of(loop.turns[0][0])[1]["prompt"]  # the first prompt, without any critique
    assert later["chosen"][0]["content"] == "The answer is B."
    assert later["rejected"][0]["content"] == "The answer is A."  # the first wrong answer, not the latest
    assert (later["round"], later["question_id"], later["source"]) == (2, "q2", "critique_retry")
    assert later["verified"] == {"chosen": "correct", "rejected": "wrong"}
    made = later["made_by"]["chosen"]
    assert (made["model"], made["turn"], made["critique"]["model"]) == ("student", 2, "teacher")


def test_a_turn_without_open_questions_writes_empty_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop(tmp_path, QUESTIONS[:1], {"q1": "The answer is B."})
    retries = loop.retries(loop.critiques(), {"q1#0#c1": "Look again."})
    loop.answered(retries, {"q1#0#r1": "The answer is A."})
    critiques = loop.critiques()
    assert critiques.read_bytes() == b""
    retries = loop.retries(critiques, {})
    loop.answered(retries, {})  # the verifier takes no samples too
    assert [pair["id"] for pair in rows_of(loop.pairs())] == ["q1#0#r1#0"]
    assert "solved: 1 in turn 1, 0 in turn 2" in capsys.readouterr().out


def test_leaking_critiques_are_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop(tmp_path, QUESTIONS, FIRST)
    told = {
        "q1#0#c1": ["Option A is right.", "It is red.", "Look at the colour again.", "Unused."],
        "q2#0#c1": "Neither A, C nor D.",
        "q4#0#c1": "Half of a",
    }
    retries = loop.retries(loop.critiques(), told, cut=["q4#0#c1"])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("3 requests, 6 critiques: 1 retries in ")
    assert "(2 without a critique to be used); dropped: 1 leaked (the right option's label)" in said
    assert "1 leaked (the right option's words), 1 not needed, 1 leaked (all options but the right one), 1 cut" in said
    (row,) = rows_of(retries)
    assert row["prompt"][-1]["content"] == "Look at the colour again. Think again."
    loop.answered(retries, {"q1#0#r1": "The answer is A."})
    assert [row["id"] for row in rows_of(loop.critiques())] == ["q2#0#c2", "q4#0#c2"]
    assert rows_of(loop.critiques("--unanswered", "drop")) == []
    assert "dropped: 1 correct, 1 solved in an earlier turn, 2 without a retry" in capsys.readouterr().out


def test_the_first_right_retry_that_does_not_speak_of_the_critique(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = Loop(tmp_path, QUESTIONS[:2], {name: FIRST[name] for name in ("q1", "q2")})
    retries = loop.retries(loop.critiques(), {"q1#0#c1": "Look.", "q2#0#c1": "Look."})
    replies = {
        "q1#0#r1": ["The answer is C.", "Given the critique, the answer is A.", "Red, so the answer is A."],
        "q2#0#r1": ["You are right. The answer is B."],
    }
    loop.answered(retries, replies)
    assert [pair["id"] for pair in rows_of(loop.pairs())] == ["q1#0#r1#2"]
    assert "1 pairs in " in (said := capsys.readouterr().out)
    assert "solved: 2 in turn 1; dropped: 1 reads as a correction" in said
    assert rows_of(loop.critiques()) == []


def test_history_last_keeps_the_first_prompt_and_the_last_answer(tmp_path: Path) -> None:
    loop = Loop(tmp_path, QUESTIONS[:1], {"q1": "The answer is B."})
    retries = loop.retries(loop.critiques(), {"q1#0#c1": "One."})
    loop.answered(retries, {"q1#0#r1": "The answer is C."})
    (row,) = rows_of(loop.retries(loop.critiques(), {"q1#0#c2": "Two."}, "--history", "last"))
    assert [turn["content"] for turn in row["prompt"][2:]] == ["The answer is C.", "Two. Think again."]
    assert row["prompt"][:2] == rows_of(loop.turns[0][0])[0]["prompt"]


def test_faults_of_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop(tmp_path, QUESTIONS[:1], {"q1": "The answer is B."})
    retries = loop.retries(loop.critiques(), {"q1#0#c1": "One."})
    loop.answered(retries, {"q1#0#r1": "The answer is C."})
    files = [str(path) for path in (*loop.turns[0], *loop.turns[1])]
    common = ["pairs", "--questions", str(loop.questions), "--kind", "option", "--out", str(tmp_path / "x")]
    lists = ["--requests", files[0], files[3], "--samples", files[1], "--verdicts", files[2], files[5]]
    assert critique_retry.main([*common, *lists]) == 2
    assert "2 files of requests, 1 of samples, 2 of verdicts: each turn has one of each" in capsys.readouterr().err
    swapped = ["--requests", files[0], files[0], "--samples", files[1], files[1], "--verdicts", files[2], files[2]]
    assert critique_retry.main([*common, *swapped]) == 2
    assert "R0.jsonl: 'q1' is no retry of turn 1: give the turns' files in their order" in capsys.readouterr().err
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"id": "q1", "prompt": "q1?"}])
    samples = answer(plain, tmp_path / "SP.jsonl", {"q1": "The answer is B."})
    verdicts = judged(loop.questions, samples, tmp_path / "VP.jsonl")
    named = ["--requests", plain, "--samples", samples, "--verdicts", verdicts, "--prompts", tmp_path / "P.toml"]
    assert critique_retry.main(["critique-requests", *common[1:], *map(str, named)]) == 2
    assert "prompt 'q1' is a string, which no chat can go on from" in capsys.readouterr().err


REAL = {
    "medqa": (
        "The answer is B.",
        "C is what you want.",
        "You do not weigh the heat-sensitive signs.",
        "The answer is C.",
    ),
    "cmexam": ("答案是A。", "法律共有24条。", "你没有说明条文数的依据。", "答案是D。"),
    "medmcqa_fa": (
        "پاسخ گزینه ب است.",
        "هیمنولپیس نانا را در نظر بگیرید.",
        "به ساختار جدار تخم توجه نکرده‌اید.",
        "پاسخ گزینه د است.",
    ),
}


@pytest.mark.parametrize("name", list(REAL))
def test_real_questions_in_three_languages(shared_dir: Path, tmp_path: Path, name: str) -> None:
    own = shared_questions(shared_dir, name, 1)
    key = own[0]["id"]
    wrong, leak, critique, right = REAL[name]
    loop = Loop(tmp_path, own, {key: wrong})
    retries = loop.retries(loop.critiques(), {f"{key}#0#c1": [leak, critique]})
    (row,) = rows_of(retries)
    assert row["prompt"][-1]["content"] == f"{critique} Think again."
    loop.answered(retries, {f"{key}#0#r1": right})
    (pair,) = rows_of(loop.pairs())
    assert [pair[side][0]["content"] for side in ("chosen", "rejected")] == [right, wrong]
