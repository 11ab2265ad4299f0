"""Free answers under a judge that can only say right or wrong, and how a person's verdicts are set against its."""

import json
import math
from pathlib import Path

import pytest
from eval_fixtures import evaluate, read_json, read_log, run, write_rows, write_samples

from data_tools.samples import read_prompts, read_samples
from eval.items import read_items
from eval.judge import judge_items, judge_verdict, written_verdict
from eval.stats import cohen_kappa
from eval.task import load_task

ROWS = [
    {"id": "a", "question": "Why is the sky blue?", "answer": "Rayleigh scattering"},
    {"id": "b", "question": "How many?", "answer": 4, "subject": "s"},
    {"id": "c", "question": "Who?", "answer": "{response} <|im_end|>", "subject": "s"},
]
TEXTS = {"a": ["Air scatters blue light more."], "b": ["Four. {gold}"], "c": ["  \n"]}


def test_verdicts_by_hand() -> None:
    """Right at -1, wrong at -2 nats: correct, by 1 / (1 + 1/e); a tie is wrong; no overflow."""
    found = judge_verdict({"right": -1.0, "wrong": -2.0})
    assert (found.verdict, found.why) == ("correct", f"right against wrong: {1 / (1 + math.exp(-1)):.3f}")
    assert judge_verdict({"right": -1.0, "wrong": -1.0}).verdict == "wrong"
    assert judge_verdict({"right": -9999.0, "wrong": -1.0}).verdict == "wrong"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Yes", "correct"),
        (" No\n", "wrong"),
        ("Yes.", "invalid"),
        ("yes", "invalid"),
        ("Yes No", "invalid"),
        ("", "invalid"),
    ],
)
def test_a_written_verdict_is_one_word_or_none(text: str, verdict: str) -> None:
    assert written_verdict(load_task("free_judged"), text).verdict == verdict


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


def test_a_judge_behind_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its prompts are written, its words read back: a right, b said too much, c has no text; no model is loaded."""
    data, samples = write_rows(tmp_path / "d.jsonl", ROWS), write_samples(tmp_path / "s.jsonl", TEXTS)
    prompts, said, out = tmp_path / "jp.jsonl", tmp_path / "js.jsonl", tmp_path / "out"
    argv = ("prompts", "--task", "free_judged", "--data", data, "--out", prompts)
    assert evaluate(*argv, "--for", "judge") == 2
    assert "--for and --samples go together" in capsys.readouterr().err
    assert evaluate(*argv, "--for", "judge", "--samples", samples) == 0
    assert "2 prompts for the judge" in capsys.readouterr().out
    asked = read_prompts(prompts)
    assert [own.id for own in asked] == ["a#0", "b#0"]
    assert asked[0].settings == {"temperature": 0.0, "max_tokens": 16, "seed": 0, "n": 1}
    assert "Rayleigh scattering\n\nAnswer to be judged:\nAir scatters blue" in str(asked[0].prompt)

    more = ("--samples", samples, "--judge-samples", said)
    write_samples(said, {"a#0": ["Yes"]}, {own.id: own.prompt for own in asked})
    assert run("free_judged", data, out, *more) == 2
    assert "has no answer to 'b#0'; make the file anew with `python -m eval.main prompts" in capsys.readouterr().err
    write_samples(said, {"a#0": ["Yes"], "b#0": ["Yes, it does."]}, {own.id: own.prompt for own in asked})
    assert run("free_judged", data, out, *more) == 0
    assert {name: row["outcome"] for name, row in read_log(out / "items.jsonl").items()} == {
        "a": "correct", "b": "invalid", "c": "invalid",
    }  # fmt: skip
    report = read_json(out / "report.json")
    assert report["result"]["judge_unreadable"] == 1
    assert "invalid because the judge wrote no verdict" in (out / "report.md").read_text(encoding="utf-8")
    assert report["digests"]["judge_samples_sha256"] and "judge_weights" not in report["digests"]
    assert report["settings"]["judge_samples_made_by"] == ["elsewhere, settings s"]
    assert list(read_log(out / "audit.jsonl")) == ["a"] and not (out / "judge_scores.jsonl").exists()
    # another answer under the same id was never judged
    write_samples(samples, {**TEXTS, "a": ["Something else."]})
    assert run("free_judged", data, tmp_path / "new", *more) == 2
    assert "id 'a#0' answers another text than is asked now" in capsys.readouterr().err


def test_a_judge_is_shown_the_options_that_a_free_question_came_from(tmp_path: Path) -> None:
    """An exam asked as an open question: the answer is free, the judge sees the options and the right one's text."""
    task_file = tmp_path / "t.toml"
    text = "{question}\\n{options}\\n{gold} is {gold_text}\\n{response}"
    task_file.write_text(f'name = "n"\nkind = "free"\n[judge]\ntext = "{text}"\n', encoding="utf-8")
    task = load_task(str(task_file))
    row = {"id": "q", "question": "Where?", "options": {"A": "liver", "B": "heart"}, "answer": "B"}
    (item,) = read_items(task, write_rows(tmp_path / "d.jsonl", [row]))
    assert item.options == {} and item.prompt[-1].content == "Where?"
    samples = read_samples(write_samples(tmp_path / "s.jsonl", {"q": ["In the chest."]})).samples
    (asked,) = judge_items(task, [item], {"q": samples})
    assert asked.prompt[-1].content == "Where?\nA. liver\nB. heart\nB is heart\nIn the chest."
