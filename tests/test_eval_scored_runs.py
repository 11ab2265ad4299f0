"""Whole runs of perplexity and preference, and the rules of preference worked by hand."""

from pathlib import Path
from typing import Any

import pytest
from eval_fixtures import head, read_json, read_log, run, write_rows

from eval.scoring import preference_row
from eval.task import parse_task


def test_perplexity_of_the_tiny_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The report's numbers are sums over the log's rows, by all tokens and by subject."""
    rows = [
        {"id": "a", "question": "one?", "answer": "the answer", "subject": "s"},
        {"id": "b", "question": "two?", "answer": "three of them and one more", "subject": "t"},
        {"id": "c", "question": "six?", "answer": "é", "subject": "t"},
    ]
    assert run("perplexity", write_rows(tmp_path / "d.jsonl", rows), tmp_path / "out", "--model", tiny_model_dir) == 0
    log = read_log(tmp_path / "out" / "items.jsonl")
    assert [log[name]["bytes"] for name in "abc"] == [11, 27, 3]  # with the space before
    result = read_json(tmp_path / "out" / "report.json")["result"]
    nats, tokens = (sum(row[name] for row in log.values()) for name in ("nats", "tokens"))
    assert result["micro"]["value"] == pytest.approx(nats / tokens, rel=1e-12)
    assert result["nats_per_byte"]["value"] == pytest.approx(nats / 41, rel=1e-12)
    of_t = (log["b"]["nats"] + log["c"]["nats"]) / (log["b"]["tokens"] + log["c"]["tokens"])
    assert result["subjects"]["t"]["value"] == pytest.approx(of_t, rel=1e-12)
    own = log["a"]["nats"] / log["a"]["tokens"]
    assert result["macro"]["value"] == pytest.approx((own + of_t) / 2, rel=1e-12)


PAIR = {"id": "p", "chosen": [-10.0, 5], "rejected": [-9.0, 3]}
REFERENCE = {"id": "p", "chosen": [-12.0, 5], "rejected": [-9.5, 3]}


@pytest.mark.parametrize(
    ("rule", "margin", "outcome"),
    [
        ("sum", -1.0, "wrong"),
        ("per_token", -10 / 5 + 9 / 3, "correct"),
        ("reward", (-10 + 12) - (-9 + 9.5), "correct"),
    ],
)
def test_rules_of_preference_by_hand(rule: str, margin: float, outcome: str) -> None:
    task = parse_task({"name": "p", "kind": "preference", "score": {"rule": rule}})
    row = preference_row(task, "s", PAIR, REFERENCE)
    assert (row["margin"], row["outcome"], row["score"]) == (
        pytest.approx(margin),
        outcome,
        float(outcome == "correct"),
    )
    tie = preference_row(
        task, "s", {**PAIR, "rejected": PAIR["chosen"]}, {**REFERENCE, "rejected": REFERENCE["chosen"]}
    )
    assert (tie["margin"], tie["outcome"]) == (0.0, "wrong")


def test_preference_on_the_tiny_model(
    shared_dir: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against itself every gain is 0, a tie; by its own log-probs it agrees with trainer.score's file."""
    data = head(shared_dir / "data" / "pref" / "test.jsonl", tmp_path / "d.jsonl", 5)
    argv: tuple[Any, ...] = ("--model", tiny_model_dir)
    assert run("preference", data, tmp_path / "out", *argv) == 2
    assert "--reference: score.rule = reward needs it" in capsys.readouterr().err
    assert run("preference", data, tmp_path / "out", *argv, "--reference", tiny_model_dir) == 0
    result = read_json(tmp_path / "out" / "report.json")["result"]
    assert result["micro"]["value"] == 0 and result["margin_nats"]["value"] == 0
    assert sum(own["items"] for own in result["subjects"].values()) == 5
    log = read_log(tmp_path / "out" / "items.jsonl")
    scored = read_log(tmp_path / "out" / "reference_scores.jsonl")
    assert {name: row["reference_chosen"] for name, row in log.items()} == {
        name: row["chosen"][0] for name, row in scored.items()
    }
