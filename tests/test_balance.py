"""What is still to be drawn, worked by hand, and a sampler that draws just that."""

from collections import Counter
from pathlib import Path

import pytest
from pool_fixtures import attempt, rows_of, write_answers

from data_tools import balance, verify
from data_tools.jsonl import write_rows
from data_tools.pipeline_plan import says_stop
from data_tools.pool import read_pool, write_pool
from data_tools.samples import read_samples
from eval import sample
from trainer.entry import exit_code

PROMPTS = '[answer]\ntext = "{question}"\n'
RIGHT, WRONG, UNREAD = ("5", "correct"), ("6", "wrong"), ("?", "invalid")


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """The options of `requests` for three questions, each wording being its id and a question mark."""
    questions, prompts = tmp_path / "q.jsonl", tmp_path / "p.toml"
    write_rows(questions, [{"id": name, "question": f"{name}?", "gold": 5} for name in "abc"])
    prompts.write_text(PROMPTS, encoding="utf-8")
    files = ["--questions", str(questions), "--kind", "number", "--prompts", str(prompts)]
    return ["requests", *files, "--out", str(tmp_path / "r.jsonl")]


def counts(folder: Path) -> dict[str, int]:
    return {row["id"]: row["settings"]["n"] for row in rows_of(folder / "r.jsonl")}


def test_only_what_is_missing_is_asked_for(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goal = ["--right", "2", "--wrong", "1", "--at-once", "3", "--tries", "5"]
    assert balance.main([*asked, *goal]) == 0
    assert counts(tmp_path) == {"a": 3, "b": 3, "c": 3}
    assert "0 have enough, 3 open, 0 used up their tries; 9 more answers to draw" in capsys.readouterr().out
    requests = (tmp_path / "r.jsonl").read_bytes()

    # a has enough; b is short of a wrong one, but only 2 tries are left; c has used up all.
    answers = {"a": [RIGHT, WRONG, RIGHT], "b": [RIGHT, UNREAD, RIGHT], "c": [WRONG] * 5}
    files = write_answers(tmp_path, answers, name="drawn_")
    so_far = ["--drawn", files[1], *files[2:]]
    assert balance.main([*asked, *goal, *so_far]) == 0
    assert counts(tmp_path) == {"a": 3, "b": 5, "c": 5}
    assert "1 have enough, 1 open, 1 used up their tries; 2 more answers to draw" in capsys.readouterr().out
    assert balance.main([*asked, *goal, *so_far, "--invalid", "wrong"]) == 0
    assert counts(tmp_path) == {"a": 3, "b": 3, "c": 5}
    # Compared by their words, the two right answers of a and of b are one.
    assert balance.main([*asked, *goal, *so_far, "--by", "text"]) == 0
    assert counts(tmp_path) == {"a": 5, "b": 5, "c": 5}
    assert balance.main([*asked, *goal]) == 0 and (tmp_path / "r.jsonl").read_bytes() == requests


def test_the_state_of_a_loop_says_stop_when_nothing_is_open(asked: list[str], tmp_path: Path) -> None:
    goal = ["--right", "1", "--wrong", "1", "--at-once", "2", "--tries", "2", "--state", str(tmp_path / "state")]
    assert balance.main([*asked, *goal]) == 0
    assert not says_stop(str(tmp_path / "state"))
    assert (tmp_path / "state").read_text() == "go on\n0 have enough, 3 open, 0 used up their tries\n"
    files = write_answers(tmp_path, {"a": [RIGHT, WRONG], "b": [RIGHT, RIGHT], "c": [WRONG, RIGHT]}, name="drawn_")
    assert balance.main([*asked, *goal, "--drawn", files[1], *files[2:]]) == 0
    assert says_stop(str(tmp_path / "state"))
    assert (tmp_path / "state").read_text() == "stop\n2 have enough, 0 open, 1 used up their tries\n"


def test_the_sampler_draws_just_these(asked: list[str], tmp_path: Path, tiny_model_dir: Path) -> None:
    requests, samples, verdicts = (tmp_path / f"{name}.jsonl" for name in "rsv")
    draw = ["--model", str(tiny_model_dir), "--prompts", str(requests), "--out", str(samples), "--max-tokens", "4"]
    judge = [
        "--kind",
        "number",
        "--tasks",
        str(tmp_path / "q.jsonl"),
        "--samples",
        str(samples),
        "--out",
        str(verdicts),
    ]
    so_far = ["--drawn", str(requests), "--samples", str(samples), "--verdicts", str(verdicts)]
    goal = ["--right", "1", "--wrong", "0", "--at-once", "2", "--tries", "3"]
    assert balance.main([*asked, *goal]) == 0
    for drawn in (6, 9, 9):  # a random model is never right: 2 each, then the third, then nothing
        assert exit_code(sample.main, draw) == 0 and len(read_samples(samples).samples) == drawn
        assert verify.main(judge) == 0
        assert balance.main([*asked, *goal, *so_far]) == 0
    settled = requests.read_bytes()
    assert balance.main([*asked, *goal, *so_far]) == 0 and requests.read_bytes() == settled


def test_what_a_later_round_wants() -> None:
    parser = balance._parser().parse_args(["select", "--out", "o"])

    def need(right: int, wrong: int) -> tuple[int, int]:
        earlier = [attempt("x", sample=place) for place in range(right)]
        earlier += [attempt("x", "wrong", sample=100 + place) for place in range(wrong)]
        return balance.wanted(earlier, parser)

    assert need(0, 0) == (4, 4)
    assert need(4, 4) == (2, 2)  # a half
    assert need(3, 7) == (2, 4)  # rounded up
    assert need(8, 9) == (2, 3)  # a quarter from 8 on
    assert need(0, 4) == (4, 2)


def test_select_keeps_some_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {
        "a": [("2+3=5", "correct"), ("1+4=5", "correct"), ("is 2 + 3 = 5", "correct"), ("2+4=6", "wrong"), UNREAD],
        "b": [("7", "wrong"), ("8", "wrong"), ("9", "wrong")],
    }
    files = write_answers(tmp_path, answers)
    out = tmp_path / "o.jsonl"
    goal = ["select", *files, "--right", "2", "--wrong", "2", "--by", "math", "--out", str(out)]
    assert balance.main(goal) == 0
    # of the two 2+3=5 the first stands alone when it is compared, so it stays
    assert [(own.id, own.sample) for own in read_pool(out)] == [("a", 0), ("a", 1), ("a", 3), ("b", 0), ("b", 1)]
    assert capsys.readouterr().out == (
        f"0 earlier and 2 right, 3 wrong new answers in {out}; 2 questions have fewer than wanted, 1 one side only; "
        "dropped: 1 invalid, 1 the same path, 1 not needed\n"
    )
    assert balance.main([*goal, "--both"]) == 0
    assert {own.id for own in read_pool(out)} == {"a"}


def test_a_later_round_keeps_what_was_there(tmp_path: Path) -> None:
    earlier, out = tmp_path / "p0.jsonl", tmp_path / "p1.jsonl"
    write_pool(earlier, [attempt(text, "correct", sample=place, question="a") for place, text in enumerate("wxyz")])
    new = [(text, "correct") for text in "zuvt"] + [("n", "wrong")]
    files = write_answers(tmp_path, {"a": new})
    command = ["select", *files, "--earlier", str(earlier), "--round", "1", "--by", "text", "--out", str(out)]
    assert balance.main(command) == 0
    found = read_pool(out)
    assert [own.text for own in found] == ["w", "x", "y", "z", "u", "v", "n"]  # z is there; half of 4 more
    assert [own.id for own in found[4:]] == ["a#r1"] * 3 and Counter(own.round for own in found) == {0: 4, 1: 3}
    before = out.read_bytes()
    assert balance.main(command) == 0 and out.read_bytes() == before
