"""Whole runs of tasks: with the tiny model, with samples drawn elsewhere whose verdicts are known, after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from eval_fixtures import evaluate, head, read_json, read_log, run, write_rows, write_samples
from run_fixtures import PATIENCE_S, ROOT

from data_tools.endpoint_request import Sampling
from data_tools.samples import Sample
from eval.best_of_n import with_best
from eval.verifier import decided, without_verifier

CHOICE = """
name = "short choice"
kind = "choice"
[prompt]
text = "{question}\\n{options}"
[sampling]
n = 3
temperature = 1.0
max_tokens = 8
[vote]
threshold = 2
[score]
k = [1, 2]
"""
ROWS = [
    {"id": "a", "question": "1?", "options": {"A": "x", "B": "y", "C": "z"}, "answer": "A", "subject": "s"},
    {"id": "b", "question": "2?", "options": {"A": "x", "B": "y", "C": "z"}, "answer": "B", "subject": "s"},
    {"id": "c", "question": "3?", "options": {"A": "x", "B": "y"}, "answer": "A", "subject": "t"},
    {"id": "d", "question": "4?", "options": {"A": "x", "B": "y"}, "answer": "A", "subject": "t"},
]
TEXTS = {
    "a": ["The answer is A.", "The answer is (A).", "The answer is C."],  # 2 of 3 right, the vote too
    "b": ["The answer is A.", "The answer is A.", "The answer is B."],  # 1 of 3 right, the vote wrong
    "c": ["The answer is A.", "The answer is B.", "I do not know."],  # 1 of 3 right, no majority of 2
    "d": ["Hm.", "I do not know.", ""],  # nothing to read
}


@pytest.fixture
def choice(tmp_path: Path) -> Path:
    path = tmp_path / "choice.toml"
    path.write_text(CHOICE, encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def test_votes_of_known_samples_by_hand(choice: Path, rows: Path, tmp_path: Path) -> None:
    """Outcomes correct, wrong, abstained, invalid, one each; every number below is counted from TEXTS."""
    samples = write_samples(tmp_path / "samples.jsonl", TEXTS)
    assert run(choice, rows, tmp_path / "out", "--samples", samples) == 0
    log = read_log(tmp_path / "out" / "items.jsonl")
    assert {name: row["outcome"] for name, row in log.items()} == {
        "a": "correct", "b": "wrong", "c": "abstained", "d": "invalid",
    }  # fmt: skip
    assert log["a"]["votes"] == {"A": 2, "C": 1} and log["a"]["right"] == 2
    result = read_json(tmp_path / "out" / "report.json")["result"]
    assert result["outcomes"] == {"correct": 1, "wrong": 1, "abstained": 1, "invalid": 1}
    assert result["micro"] == pytest.approx({"value": 0.25, "low": 0.045587, "high": 0.699358}, abs=1e-5)
    assert result["macro"]["value"] == pytest.approx((0.5 + 0.0) / 2)
    assert (result["answered"]["items"], result["answered"]["value"]) == (2, 0.5)
    assert result["chance"] == pytest.approx((2 / 3 + 2 / 2) / 4)
    assert result["negative_marking"]["value"] == pytest.approx((1 - 1 / 2) / 4)
    assert result["pass_at_k"]["1"]["value"] == pytest.approx((2 + 1 + 1 + 0) / 3 / 4)
    assert result["pass_at_k"]["2"]["value"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 0) / 4)
    samples_of = result["samples"]
    assert samples_of["verdicts"] == {"correct": 4, "wrong": 4, "invalid": 4}
    assert samples_of["accuracy_mean"] == pytest.approx(1 / 3)
    # right by sample number: 2, 1, 1 of 4
    assert samples_of["accuracy_sd"] == pytest.approx(0.144338, abs=1e-6)
    assert (samples_of["tokens"], samples_of["cut"]) == (120, 0)


def test_a_penalty_of_the_task_and_the_first_of_a_tie(choice: Path, rows: Path, tmp_path: Path) -> None:
    text = CHOICE.replace("threshold = 2", 'ties = "first"').replace("k = [1, 2]", "penalty = 1")
    choice.write_text(text, encoding="utf-8")
    assert run(choice, rows, tmp_path / "out", "--samples", write_samples(tmp_path / "s.jsonl", TEXTS)) == 0
    result = read_json(tmp_path / "out" / "report.json")["result"]
    assert result["outcomes"] == {"correct": 2, "wrong": 1, "abstained": 0, "invalid": 1}
    assert result["negative_marking"] == {"value": pytest.approx(0.25), "penalty": 1.0}


def said(text: str) -> Sample:
    return Sample(id="c", sample=0, text=text, finish_reason="stop", model="v", settings_digest="s", prompt_digest="p")


@pytest.mark.parametrize(
    ("text", "pick", "answer", "outcome"),
    [
        ("Answer 1 is careful. The answer is 1.", 1, "A", "correct"),
        ("The answer is 2.", 2, "B", "wrong"),
        ("The answer is 3.", 3, None, "abstained"),  # a sample without a readable answer
        ("The answer is 4.", None, None, "abstained"),
        ("Hard to say.", None, None, "abstained"),
    ],
)
def test_what_the_verifier_says(text: str, pick: int | None, answer: str | None, outcome: str) -> None:
    verdicts = [
        {"verdict": "correct", "extracted": "A"},
        {"verdict": "wrong", "extracted": "B"},
        {"verdict": "invalid", "extracted": None},
    ]
    row = {"id": "c", "n": 3, "answer": None, "outcome": "abstained", "score": 0.0, "verdicts": verdicts}
    found = decided(row, said(text))
    assert (found["verifier"]["pick"], found["answer"], found["outcome"]) == (pick, answer, outcome)
    assert found["score"] == float(outcome == "correct")
    assert [{**own, "verifier": 0} for own in without_verifier([found])] == [{**row, "verifier": 0}]


def test_a_verifier_is_asked_about_the_open_items(
    choice: Path, rows: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only item c has answers and no majority; its prompt shows the question and all three samples."""
    choice.write_text(CHOICE + "[verifier]\nmax_tokens = 4\n", encoding="utf-8")
    samples = write_samples(tmp_path / "samples.jsonl", TEXTS)
    more = ("--samples", samples, "--verifier", tiny_model_dir)
    assert run(choice, rows, tmp_path / "out", *more) == 0
    (prompt,) = read_log(tmp_path / "out" / "verifier_prompts.jsonl").values()
    assert prompt["id"] == "c" and prompt["settings"]["max_tokens"] == 4
    assert prompt["prompt"].startswith("3?\n\nHere are 3 answers")
    assert "Answer 2:\nThe answer is B.\n\nAnswer 3:\nI do not know." in prompt["prompt"]
    result = read_json(tmp_path / "out" / "report.json")["result"]
    assert result["verifier"]["asked"] == 1 and result["verifier"]["vote_alone"]["value"] == 0.25
    assert "verifier_weights" in read_json(tmp_path / "out" / "report.json")["digests"]
    assert run(choice, rows, tmp_path / "out", *more) == 0
    assert run("mbpp", rows, tmp_path / "new", *more) == 2
    assert "--verifier: kind code has no vote" in capsys.readouterr().err


def test_a_verifier_behind_a_server(
    choice: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked about c alone, it names the first of its samples, which says A and is right."""
    samples, prompts, said = write_samples(tmp_path / "s.jsonl", TEXTS), tmp_path / "vp.jsonl", tmp_path / "vs.jsonl"
    asked = ("prompts", "--task", choice, "--data", rows, "--out", prompts, "--for", "verifier", "--samples", samples)
    assert evaluate(*asked) == 0
    ((name, prompt),) = read_log(prompts).items()
    assert name == "c" and prompt["prompt"].startswith("3?\n\nHere are 3 answers")
    write_samples(said, {"c": ["The answer is 1."]}, {"c": prompt["prompt"]})
    more = ("--samples", samples, "--verifier-samples", said)
    assert run(choice, rows, tmp_path / "out", *more) == 0
    report = read_json(tmp_path / "out" / "report.json")
    assert (report["result"]["verifier"]["decided"], report["result"]["micro"]["value"]) == (1, 0.5)
    assert "verifier_samples_sha256" in report["digests"]
    write_samples(said, {"c": ["The answer is 1."]}, {"c": "another"})
    assert run(choice, rows, tmp_path / "new", *more) == 2
    assert "id 'c' answers another text than is asked now" in capsys.readouterr().err


def test_best_of_n_by_hand() -> None:
    """Gains 1, 3 and 3 nats with an empty sample among them: the first of the best two, which is wrong."""
    samples = [said("x"), said("  "), said("y"), said("z")]
    verdicts = [{"verdict": name} for name in ("correct", "invalid", "wrong", "correct")]
    row = {"id": "c", "verdicts": verdicts}
    policy, reference = {"logps": [-4.0, -5.0, -1.0]}, {"logps": [-5.0, -8.0, -4.0]}
    found = with_best(row, samples, policy, reference)
    assert (found["rewards"], found["best"], found["best_score"]) == ([1.0, None, 3.0, 3.0], 2, 0.0)
    assert with_best(row, samples, {"logps": [-3.0, -9.0, -1.0]}, {"logps": [-9.0, -8.0, -4.0]})["best_score"] == 1.0
    assert with_best(row, samples[1:2], None, None)["best"] is None


def test_best_of_n_against_itself_takes_the_first_sample(
    choice: Path, rows: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal models give rewards of 0: the first sample with text, right in a and c of four."""
    samples = write_samples(tmp_path / "samples.jsonl", TEXTS)
    more = ("--samples", samples, "--reward-model", tiny_model_dir)
    assert run(choice, rows, tmp_path / "out", *more) == 2
    assert "--reward-model needs --reward-reference" in capsys.readouterr().err
    assert run(choice, rows, tmp_path / "out", *more, "--reward-reference", tiny_model_dir) == 0
    log = read_log(tmp_path / "out" / "items.jsonl")
    assert log["d"]["rewards"] == [0.0, 0.0, None] and log["a"]["outcome"] == "correct"
    result = read_json(tmp_path / "out" / "report.json")["result"]
    assert result["best_of_n"]["value"] == 0.5 and result["micro"]["value"] == 0.25
    assert "best of 3 by reward | 0.500 [" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_choice_on_the_tiny_model(choice: Path, rows: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Files, settings and digests; a second start draws nothing and says the same."""
    out = tmp_path / "out"
    assert run(choice, rows, out, "--model", tiny_model_dir, "--limit", 3) == 0
    report = read_json(out / "report.json")
    assert report["result"]["items"] == 3 and report["result"]["samples"]["samples"] == 9
    assert report["baseline"].startswith("none was run")
    settings = report["settings"]
    assert settings["task"]["sampling"]["seed"] == 0 and settings["limit"] == 3 and settings["torch"]
    for name in ("task", "prompt_template", "data_sha256", "model_weights", "model_tokenizer", "model_chat_template"):
        assert re.fullmatch(r"[0-9a-f]{16}|[0-9a-f]{64}", report["digests"][name]), name
    assert len(report["digests"]["code"]["sources"]) == 64
    samples = (out / "samples.jsonl").read_bytes()
    assert run(choice, rows, out, "--model", tiny_model_dir, "--limit", 3) == 0
    assert (out / "samples.jsonl").read_bytes() == samples
    assert read_json(out / "report.json")["result"] == report["result"]
    # more items of the same file are welcome
    assert run(choice, rows, out, "--model", tiny_model_dir) == 0
    assert (out / "samples.jsonl").read_bytes().startswith(samples)
    assert read_json(out / "report.json")["result"]["items"] == 4


def test_prompts_and_samples_of_another_place_give_the_same_run(
    choice: Path, rows: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    assert run(choice, rows, tmp_path / "whole", "--model", tiny_model_dir) == 0
    assert evaluate("prompts", "--task", choice, "--data", rows, "--out", tmp_path / "p.jsonl") == 0
    assert (tmp_path / "p.jsonl").read_bytes() == (tmp_path / "whole" / "prompts.jsonl").read_bytes()
    for row in read_log(tmp_path / "p.jsonl").values():
        assert Sampling().changed(row["settings"]).n == 3  # a server's client takes the same settings
    assert run(choice, rows, tmp_path / "out", "--samples", tmp_path / "whole" / "samples.jsonl") == 0
    assert read_log(tmp_path / "out" / "items.jsonl") == read_log(tmp_path / "whole" / "items.jsonl")


def test_other_settings_are_refused(
    choice: Path, rows: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = write_samples(tmp_path / "s.jsonl", TEXTS)
    assert run(choice, rows, tmp_path / "out", "--samples", samples) == 0
    settings = read_json(tmp_path / "out" / "settings.json")
    settings["code"]["sources"] = "before"  # other code is no reason to refuse, and is named in the report
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    for _ in range(2):
        assert run(choice, rows, tmp_path / "out", "--samples", samples) == 0
        assert "before" in read_json(tmp_path / "out" / "report.json")["digests"]["code"]["earlier"]
    write_rows(rows, ROWS[:3])
    choice.write_text(CHOICE.replace("threshold = 2", "threshold = 1"), encoding="utf-8")
    assert run(choice, rows, tmp_path / "out", "--samples", samples) == 2
    assert "holds a run with another task, data_sha256; name another --out" in capsys.readouterr().err
    write_samples(samples, {**TEXTS, "c": ["x"]})
    assert run(choice, rows, tmp_path / "new", "--samples", samples) == 2
    assert "id 'c': its sample 1 is missing; draw 3 an item" in capsys.readouterr().err
    for more, problem in (
        ((), "--model: required"),
        (("--model", tiny_model_dir, "--samples", samples), "--model would not be used"),
        (("--samples", samples, "--limit", 0), "--limit: must be 1 or more"),
        (("--samples", tmp_path / "none.jsonl"), "none.jsonl: no such file"),
    ):
        assert run(choice, rows, tmp_path / "new", *more) == 2
        assert problem in capsys.readouterr().err


def test_a_start_that_failed_does_not_hold_its_folder(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mended data file is welcome as long as nothing was scored with the faulty one."""
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "?", "chosen": "a", "rejected": "a"}])
    task = tmp_path / "t.toml"
    task.write_text('name = "t"\nkind = "preference"', encoding="utf-8")
    assert run(task, data, tmp_path / "out", "--model", tiny_model_dir) == 2
    assert "d.jsonl:1: field 'rejected': identical to 'chosen'" in capsys.readouterr().err
    write_rows(data, [{"prompt": "?", "chosen": "a", "rejected": "b"}])
    assert run(task, data, tmp_path / "out", "--model", tiny_model_dir) == 0
    write_rows(data, [{"prompt": "?", "chosen": "a", "rejected": "c"}])
    assert run(task, data, tmp_path / "out", "--model", tiny_model_dir) == 2
    assert "holds a run with another data_sha256" in capsys.readouterr().err
    mine = write_rows(tmp_path / "items.jsonl", [{"id": 1}])  # somebody's own file is not taken for a log
    assert run(task, data, tmp_path, "--model", tiny_model_dir) == 2
    assert "has items.jsonl but no settings.json: not a run's folder" in capsys.readouterr().err
    assert mine.read_text(encoding="utf-8") == '{"id": 1}\n'


def test_likelihood_run_goes_on_after_a_torn_row(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Two whole rows stay as they are (one is marked to see it), the torn third one and the rest are computed again."""
    data = write_rows(tmp_path / "d.jsonl", ROWS)
    assert run("choice_letter", data, tmp_path / "whole", "--model", tiny_model_dir) == 0
    whole = read_log(tmp_path / "whole" / "items.jsonl")
    lines = (tmp_path / "whole" / "items.jsonl").read_bytes().splitlines(keepends=True)
    assert run("choice_letter", data, tmp_path / "out", "--model", tiny_model_dir, "--limit", 1) == 0
    marked = {**json.loads(lines[0]), "mark": 1}
    content = json.dumps(marked).encode() + b"\n" + lines[1] + lines[2][:40]
    (tmp_path / "out" / "items.jsonl").write_bytes(content)
    assert run("choice_letter", data, tmp_path / "out", "--model", tiny_model_dir) == 0
    found = read_log(tmp_path / "out" / "items.jsonl")
    assert found.pop(marked["id"]) == marked
    del whole[marked["id"]]
    for name, row in whole.items():
        for label, (logps, *counts) in row.pop("likelihoods").items():
            again = found[name]["likelihoods"][label]
            assert again[0] == pytest.approx(logps, abs=1e-4) and again[1:] == counts
        del found[name]["likelihoods"]
    assert found == whole


def test_a_killed_run_goes_on(choice: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """SIGKILL while samples are drawn; the same command then ends as an unbroken one."""
    choice.write_text(CHOICE.replace("max_tokens = 8", "max_tokens = 50"), encoding="utf-8")
    data = write_rows(tmp_path / "d.jsonl", [{**ROWS[0], "id": f"q{number}"} for number in range(10)])
    out = tmp_path / "out"
    argv = ["run", "--task", choice, "--data", data, "--model", tiny_model_dir, "--dtype", "float32", "--slots", 2]
    command = [sys.executable, "-m", "eval.main", *map(str, argv), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "samples.jsonl").exists() and (out / "samples.jsonl").read_bytes().count(b"\n") >= 3:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    there = (out / "samples.jsonl").read_bytes()
    assert not (out / "report.json").exists() and there.count(b"\n") < 30
    assert evaluate(*argv, "--out", out) == 0
    assert evaluate(*argv, "--out", tmp_path / "whole") == 0
    assert (out / "samples.jsonl").read_bytes().startswith(there[: there.rfind(b"\n") + 1])
    assert read_log(out / "items.jsonl") == read_log(tmp_path / "whole" / "items.jsonl")
    results = [read_json(folder / "report.json")["result"] for folder in (out, tmp_path / "whole")]
    assert results[0] == results[1]


def test_numbers_of_reference_solutions(shared_dir: Path, tmp_path: Path) -> None:
    """Published solutions are right; with another last number wrong; without one invalid."""
    data = head(shared_dir / "data" / "gsm8k" / "test.jsonl", tmp_path / "d.jsonl", 6)
    rows = list(read_log(data).values())
    texts = {row["id"]: [row["answer"]] for row in rows}
    texts[rows[4]["id"]] = [re.sub(r"#### .*", "#### 123456", rows[4]["answer"])]
    texts[rows[5]["id"]] = ["I would rather not say."]
    assert run("numeric", data, tmp_path / "out", "--samples", write_samples(tmp_path / "s.jsonl", texts)) == 0
    result = read_json(tmp_path / "out" / "report.json")["result"]
    assert result["outcomes"] == {"correct": 4, "wrong": 1, "abstained": 0, "invalid": 1}
    assert "negative_marking" not in result and result["macro"] is None


def test_programs_are_run(shared_dir: Path, tmp_path: Path) -> None:
    """Three samples of one item: the published solution, the same broken, no program: pass@1 1/3, pass@2 2/3."""
    data = head(shared_dir / "data" / "humaneval" / "test.jsonl", tmp_path / "d.jsonl", 1)
    row = json.loads(data.read_text(encoding="utf-8"))
    solution = row["prompt"] + row["canonical_solution"]
    broken = re.sub(r"return .*", "return None", solution)
    assert broken != solution
    texts = {row["task_id"]: [f"```python\n{solution}```", f"```python\n{broken}```", "I cannot."]}
    task = tmp_path / "code.toml"
    keys = ('name = "code"', 'kind = "code"', 'fields.id = "task_id"', 'prompt.text = "{prompt}"')
    task.write_text("\n".join((*keys, "sampling.n = 3", "score.k = [1, 2]")), encoding="utf-8")
    samples = write_samples(tmp_path / "s.jsonl", texts)
    assert run(task, data, tmp_path / "out", "--samples", samples) == 0
    report = read_json(tmp_path / "out" / "report.json")["result"]
    assert report["metric"] == "pass@1" and report["outcomes"] is None
    assert [report["pass_at_k"][k]["value"] for k in "12"] == pytest.approx([1 / 3, 2 / 3])
    assert report["samples"]["verdicts"] == {"correct": 1, "wrong": 1, "invalid": 1}
    log = read_log(tmp_path / "out" / "items.jsonl")[row["task_id"]]
    assert [said["verdict"] for said in log["verdicts"]] == ["correct", "wrong", "invalid"]
    # programs are not run again: a row that is there stays
    write_rows(tmp_path / "out" / "programs.jsonl", [{**log, "right": 3}])
    assert run(task, data, tmp_path / "out", "--samples", samples) == 0
    assert read_json(tmp_path / "out" / "report.json")["result"]["pass_at_k"]["1"]["value"] == 1
