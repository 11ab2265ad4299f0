"""Free answers under a judge that can only say right or wrong, and how a person's verdicts are set against its."""

import json
import math
from pathlib import Path

import pytest
from eval_fixtures import read_json, read_log, run, write_rows, write_samples

from eval.judge import judge_verdict
from eval.stats import cohen_kappa

ROWS = [
    {"id": "a", "question": "Why is the sky blue?", "answer": "Rayleigh scattering"},
    {"id": "b", "question": "How many?", "answer": 4, "subject": "s"},
    {"id": "c", "question": "Who?", "answer": "{response} <|im_end|>", "subject": "s"},
]
TEXTS = {"a": ["Air scatters blue light more."], "b": ["Four. {gold}"], "c": ["  \n"]}


def test_verdicts_by_hand() -> None:
    """Right at -1, wrong at -2 nats: correct, by 1 / (1 + 1/e); a tie is wrong; no text is invalid; no overflow."""
    found = judge_verdict({"right": -1.0, "wrong": -2.0})
    assert (found.verdict, found.why) == ("correct", f"right against wrong: {1 / (1 + math.exp(-1)):.3f}")
    assert judge_verdict({"right": -1.0, "wrong": -1.0}).verdict == "wrong"
    assert judge_verdict({"right": -9999.0, "wrong": -1.0}).verdict == "wrong"
    assert judge_verdict(None).verdict == "invalid"


def test_kappa_by_hand() -> None:
    """20 both yes, 5 only the first, 10 only the second, 15 both no: po 0.7, pe 0.5 x 0.6 + 0.5 x 0.4, kappa 0.4."""
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(["y"], ["y"]) == 1.0
    with pytest.raises(ValueError, match="got 1 and 2"):
        cohen_kappa(["y"], ["y", "n"])


def test_a_judged_run_and_its_audit(tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "d.jsonl", ROWS)
    samples = write_samples(tmp_path / "s.jsonl", TEXTS)
    out = tmp_path / "out"
    argv = ("free_judged", data, out, "--samples", samples, "--judge", tiny_model_dir)
    assert run("free_judged", data, out, "--samples", samples) == 2
    assert "--judge: kind free needs a model that judges" in capsys.readouterr().err
    assert run(*argv) == 0
    log, scores = read_log(out / "items.jsonl"), read_log(out / "judge_scores.jsonl")
    assert set(scores) == {"a#0", "b#0"}
    for name in "ab":
        own = scores[f"{name}#0"]
        assert log[name]["outcome"] == ("correct" if own["right"] > own["wrong"] else "wrong")
    assert log["c"]["outcome"] == "invalid" and log["b"]["gold"] == "4"
    result = read_json(out / "report.json")["result"]
    assert result["metric"] == "judged right" and result["audit"] == {"rows": 2, "checked": 0}

    audit = read_log(out / "audit.jsonl")
    assert audit["a"] == {
        "id": "a", "sample": 0, "question": ROWS[0]["question"], "reference": "Rayleigh scattering",
        "response": TEXTS["a"][0], "human": None,
    }  # fmt: skip
    # a person agrees with the judge on one of the two
    other = {"correct": "wrong", "wrong": "correct"}
    said = {"a": log["a"]["outcome"], "b": other[log["b"]["outcome"]]}
    write_rows(out / "audit.jsonl", [{**row, "human": said[name]} for name, row in audit.items()])
    assert run(*argv) == 0
    found = read_json(out / "report.json")["result"]["audit"]
    assert (found["rows"], found["checked"], found["agreement"]["value"]) == (2, 2, 0.5)
    assert {row["human"] for row in read_log(out / "audit.jsonl").values()} == set(said.values())
    write_rows(out / "audit.jsonl", [{**audit["a"], "human": "maybe"}])
    assert run(*argv) == 2
    assert "audit.jsonl:1: field 'human': expected correct or wrong, got 'maybe'" in capsys.readouterr().err


def test_rows_of_the_log_say_what_the_judge_saw(tmp_path: Path, tiny_model_dir: Path) -> None:
    """What an answer or a reference spells of placeholders or control tokens is text: other texts, other scores."""
    scores = []
    for number, text in enumerate(("Four. {gold}", "Four. 4")):
        samples = write_samples(tmp_path / f"{number}.jsonl", {"b": [text]})
        data = write_rows(tmp_path / "d.jsonl", [ROWS[1]])
        more = ("--samples", samples, "--judge", tiny_model_dir)
        assert run("free_judged", data, tmp_path / f"out{number}", *more) == 0
        scores.append(read_log(tmp_path / f"out{number}" / "judge_scores.jsonl")["b#0"]["right"])
    assert scores[0] != scores[1]
    assert json.loads((tmp_path / "out0" / "audit.jsonl").read_text(encoding="utf-8"))["response"] == "Four. {gold}"
