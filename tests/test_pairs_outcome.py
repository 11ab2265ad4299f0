"""Right over wrong answers: which pairs, worked by hand; controls on the same texts; rows that training reads."""

from pathlib import Path
from typing import Any

import pytest
from pool_fixtures import Said, attempt, rows_of, write_answers

from data_tools import verify
from data_tools.jsonl import read_records, write_rows
from data_tools.pairs import outcome
from data_tools.pairs.outcome import candidates
from data_tools.pairs.record import read_pairs
from data_tools.pool import write_pool
from data_tools.schema import Message

ANSWERS: dict[str, list[Said]] = {
    "a": [("five", "correct"), ("it is five", "correct"), ("six", "wrong"), ("it is seven or so", "wrong"),
          ("?", "invalid")],
    "b": [("yes", "correct"), (" yes\n", "correct"), ("no", "wrong")],
    "c": [("only right", "correct")],
}  # fmt: skip


def build(folder: Path, *options: str, answers: dict[str, list[Said]] = ANSWERS) -> list[dict[str, Any]]:
    out = folder / "pairs.jsonl"
    assert outcome.main(["pairs", *write_answers(folder, answers), "--out", str(out), *options]) == 0
    return read_pairs(out) if out.stat().st_size else []


def sides(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for row in rows]


def test_nearest_in_length_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = build(tmp_path, "--pairing", "length")
    # a: five (4) and six (3) are 1 apart, then "it is five" (10) and the long one (17); b: copies are one
    assert sides(found) == [("five", "six"), ("it is five", "it is seven or so"), ("yes", "no")]
    row = found[0]
    assert (row["id"], row["question_id"], row["source"], row["round"]) == ("a#0#2", "a", "outcome", 0)
    assert row["verified"] == {"chosen": "correct", "rejected": "wrong"} and row["prompt"] == "a?"
    assert row["made_by"]["rejected"] == {"model": "m", "settings_digest": "s", "sample": "a:2"}
    assert capsys.readouterr().out == (
        f"3 questions (2 with right and wrong answers), 9 answers: 3 pairs in {tmp_path}/pairs.jsonl; "
        "chosen is the longer text in 67%; dropped: 1 invalid, 2 pairs of an answer used up, 1 the same text\n"
    )


def test_all_pairs_and_their_limits(tmp_path: Path) -> None:
    every = [("five", "six"), ("five", "it is seven or so"), ("it is five", "six"), ("it is five", "it is seven or so")]
    only_a = {"a": ANSWERS["a"]}
    assert sides(build(tmp_path, "--pairing", "all", "--uses", "9", answers=only_a)) == every
    assert sides(build(tmp_path, "--pairing", "all", answers=only_a)) == [every[0], every[3]]
    assert (
        sides(build(tmp_path, "--pairing", "all", "--uses", "2", "--rejected-uses", "1", answers=only_a)) == every[:2]
    )
    assert sides(build(tmp_path, "--pairing", "all", "--uses", "9", "--per-question", "3", answers=only_a)) == every[:3]
    near = build(tmp_path, "--pairing", "all", "--uses", "9", "--max-length-ratio", "1.7", answers=only_a)
    assert sides(near) == [every[0], every[3]]  # 4/3 and 17/10; 17/4 and 10/3 are over it
    unread = build(
        tmp_path, "--pairing", "all", "--uses", "9", "--invalid", "wrong", "--per-question", "6", answers=only_a
    )
    assert len(unread) == 6 and unread[2]["verified"]["rejected"] == "invalid"


def test_chance_is_a_function_of_seed_and_question(tmp_path: Path) -> None:
    right = [attempt(f"r{place}", sample=place) for place in range(4)]
    wrong = [attempt(f"w{place}", "wrong", sample=4 + place) for place in range(4)]
    orders = [candidates(right, wrong, pairing="random", seed=seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and len(set(orders[0])) == 16
    first = build(tmp_path)
    before = (tmp_path / "pairs.jsonl").read_bytes()
    assert build(tmp_path) == first and (tmp_path / "pairs.jsonl").read_bytes() == before


def test_lengths_in_tokens_and_answers_that_were_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, out = tmp_path / "pool.jsonl", tmp_path / "o.jsonl"
    counted = [
        attempt("a long text of few tokens", completion_tokens=3),
        attempt("b", "wrong", sample=1, completion_tokens=9),
        attempt("c", "wrong", sample=2, completion_tokens=4),
        attempt("never ends", "wrong", sample=3, completion_tokens=3, finish_reason="length"),
    ]
    write_pool(pool, counted)
    command = ["pairs", "--pool", str(pool), "--pairing", "length", "--length", "tokens", "--out", str(out)]
    assert outcome.main(command) == 0
    assert sides(rows_of(out)) == [("a long text of few tokens", "c")]
    assert "1 cut off" in capsys.readouterr().out
    write_pool(pool, [attempt("x"), attempt("y", "wrong", sample=1)])
    assert outcome.main(command) == 2
    assert "answer 0 of 'q' has no count of tokens; use --length chars" in capsys.readouterr().err


@pytest.mark.parametrize("spoken", [False, True])
def test_the_control_has_the_same_questions_and_texts(spoken: bool, tmp_path: Path) -> None:
    prompt = (Message("system", "Short."), Message("user", "q?")) if spoken else "q?"
    answers = [
        attempt("one", prompt=prompt),
        attempt("uno", sample=1, prompt=prompt),
        attempt("spare", sample=2, prompt=prompt),
    ]
    answers += [attempt(text, "wrong", sample=3 + place, prompt=prompt) for place, text in enumerate(("two", "dos"))]
    pool, out, control = (tmp_path / f"{name}.jsonl" for name in ("pool", "out", "sft"))
    write_pool(pool, answers)
    command = [
        "pairs",
        "--pool",
        str(pool),
        "--pairing",
        "all",
        "--uses",
        "2",
        "--out",
        str(out),
        "--sft",
        str(control),
    ]
    for per, count in (("text", 2), ("pair", 4)):
        assert outcome.main([*command, "--sft-per", per]) == 0
        pairs, supervised = read_records([out], kind="pair"), read_records([control], kind="sft")
        assert len(pairs) == 4 and len(supervised) == count
        assert {(row.prompt, row.completions[0]) for row in supervised} == {
            (row.prompt, row.completions[0]) for row in pairs
        }


def test_rounds_and_wordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, out = tmp_path / "pool.jsonl", tmp_path / "o.jsonl"
    later = {"id": "q#r1", "question_id": "q", "round": 1}
    write_pool(pool, [attempt("one"), attempt("two", "wrong", **later)])
    assert outcome.main(["pairs", "--pool", str(pool), "--out", str(out)]) == 0
    assert [(row["id"], row["round"]) for row in rows_of(out)] == [("q#0#r1.0", 1)]
    assert outcome.main(["pairs", "--pool", str(pool), "--out", str(out), "--round", "3"]) == 0
    assert rows_of(out)[0]["round"] == 3
    write_pool(pool, [attempt("one"), attempt("two", "wrong", **later, prompt="Q?")])
    assert outcome.main(["pairs", "--pool", str(pool), "--out", str(out)]) == 2
    assert "question 'q' was asked in 2 wordings" in capsys.readouterr().err
    assert outcome.main(["pairs", "--pool", str(pool), "--max-length-ratio", "0.5", "--out", str(out)]) == 2
    assert "--max-length-ratio 0.5: must be at least 1" in capsys.readouterr().err


def test_real_answers(shared_dir: Path, tmp_path: Path) -> None:
    """Model answers to GSM8K problems, judged by the rule: the pairs are of answers that the data labels so."""
    source = rows_of(shared_dir / "data/pref_gsm8k/train.jsonl")[:200]
    golds = {row["prompt"][0]["content"]: row["reference_answer"] for row in source}
    names = {text: f"p{place}" for place, text in enumerate(golds)}
    texts: dict[str, dict[str, bool]] = {name: {} for name in names.values()}
    for row in source:
        own = texts[names[row["prompt"][0]["content"]]]
        own |= {row["chosen"][0]["content"]: True, row["rejected"][0]["content"]: False}
    answers = {name: [(text, "invalid") for text in own] for name, own in texts.items()}
    files, tasks, out = write_answers(tmp_path, answers), tmp_path / "q.jsonl", tmp_path / "o.jsonl"
    write_rows(tasks, [{"id": names[text], "question": text, "gold": gold} for text, gold in golds.items()])
    samples, verdicts = files[3], files[5]
    assert verify.main(["--kind", "number", "--tasks", str(tasks), "--samples", samples, "--out", verdicts]) == 0
    limits = ["--pairing", "length", "--max-length-ratio", "1.5", "--uses", "2"]
    assert outcome.main(["pairs", *files, "--questions", str(tasks), *limits, "--out", str(out)]) == 0
    pairs = read_pairs(out)
    assert len(pairs) > len(golds) / 2
    for pair in pairs:
        own = texts[pair["question_id"]]
        assert own[pair["chosen"]] and not own[pair["rejected"]]
        shorter, longer = sorted((len(pair["chosen"]), len(pair["rejected"])))
        assert longer <= 1.5 * shorter
