"""Scores of samples and numbers of reward models: by hand, against the model's own output, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_fixtures import read_json, read_log, write_rows, write_samples
from eval_fixtures import run as evaluate_run
from prm_fixtures import write_steps
from run_fixtures import arguments, run_here, torch_settings_kept

from data_tools.chat_template import load_chat_template
from data_tools.encode import EncodeOptions, encode_records
from data_tools.errors import UserError
from data_tools.jsonl import read_records
from data_tools.samples import Prompt, Sample, prompt_digest, row_of
from data_tools.tokenizer import load_tokenizer
from eval import prm
from eval.best_of_n import with_prm
from eval.prm_numbers import MEASURES, differences, measures, numbers
from eval.step_scores import Splitter, load_reward_model
from trainer.batch import build_stream
from trainer.entry import exit_code
from trainer.metrics import read_metrics
from trainer.prm import aggregate, area_under_curve

LORA = ("lora.r=4", "lora.alpha=8", "train.learning_rate=1e-2")


def command(*argv: object) -> int:
    with torch_settings_kept():
        return exit_code(prm.main, [str(item) for item in argv])


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_steps(tmp_path_factory.mktemp("steps") / "eval.jsonl", 7, seed=1, start=100)


@pytest.fixture(scope="module")
def runs(tiny_model_dir: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full run on hard labels, its control on outcomes, and a run with adapters."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_steps(folder / "train.jsonl")
    for name, settings in {"hard": (), "outcome": ("prm.labels=outcome", "prm.aggregation=min"), "lora": LORA}.items():
        common = ("train.objective=prm", "train.max_steps=6", "data.max_length=2048", f"data.eval={held_out}")
        assert run_here(arguments(folder / name, tiny_model_dir, *common, *settings, data=data)) == 0
    return {name: folder / name for name in ("hard", "outcome", "lora")}


QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
LAST = "The answer is 6"
TEXTS = {("a", 0): f"2 + 3 = 5\nSo it is 5.\n{LAST}", ("a", 1): "", ("b", 0): "six\n", ("a", 2): LAST}
STEPS = {("a", 0): ["2 + 3 = 5\n", "So it is 5.\n"], ("a", 1): [], ("b", 0): ["six\n"], ("a", 2): ["The answer is 6"]}


@pytest.fixture
def sampled(tmp_path: Path) -> tuple[Path, Path]:
    """Prompts, one with a prefix, and samples for them out of order."""
    rows = [{"id": "a", "prompt": QUESTION}, {"id": "b", "prompt": "Q: 1 + 5? A: ", "prefix": "It is "}]
    digests = {"a": prompt_digest(read_prompt(QUESTION)), "b": prompt_digest("Q: 1 + 5? A: ", "It is ")}
    samples = [
        Sample(id=name, sample=number, text=text, finish_reason="stop", model="m", settings_digest="s",
               prompt_digest=digests[name])
        for (name, number), text in TEXTS.items()
    ]  # fmt: skip
    (tmp_path / "S.jsonl").write_bytes(b"".join(map(row_of, samples)))
    return write_rows(tmp_path / "P.jsonl", rows), tmp_path / "S.jsonl"


def read_prompt(messages: list[dict[str, str]]):
    from data_tools.schema import check_prompt

    return check_prompt({"prompt": messages}, path="p", line=1).prompt


def by_the_model(folder: Path, steps: list[str], prompt: object) -> list[float]:
    """Probabilities of one answer's steps by a stream of its own, from rows of kind prm."""
    row = {"id": "x", "prompt": prompt, "steps": steps, "hard": [0] * len(steps)}
    path = folder.parent / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    options = EncodeOptions(kind="prm", max_length=None)
    export = folder / "export"
    records = read_records([path], kind="prm")
    groups, _ = encode_records(records, load_tokenizer(export), load_chat_template(export), options)
    with torch.no_grad():
        return (
            load_reward_model(export).model(build_stream(groups, at_tokens=True), output="rewards").sigmoid().tolist()
        )


def test_samples_get_the_models_own_scores(
    runs: dict[str, Path], sampled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All samples of a prompt are branches of one group; each is what it would be alone. The last line is no step."""
    prompts, samples = sampled
    common = ("--prompts", prompts, "--samples", samples, "--out", tmp_path / "out.jsonl")
    assert command("--model", runs["hard"] / "export", *common) == 0
    assert "4 samples of 2 prompts scored (mean of steps), mean score 0." in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == list(TEXTS)
    for row in rows:
        steps = STEPS[row["id"], row["sample"]]
        if not steps:
            assert row == {"id": "a", "sample": 1, "score": None, "step_scores": []}
            continue
        prompt = QUESTION if row["id"] == "a" else "Q: 1 + 5? A: "
        whole = steps if row["id"] == "a" else ["It is six\n"]
        with torch_settings_kept():
            assert row["step_scores"] == pytest.approx(by_the_model(runs["hard"], whole, prompt), rel=1e-5)
        assert row["score"] == pytest.approx(sum(row["step_scores"]) / len(steps))
    first = (tmp_path / "out.jsonl").read_bytes()
    assert command("--model", runs["hard"] / "export", *common) == 0 and (tmp_path / "out.jsonl").read_bytes() == first
    assert command("--model", runs["hard"] / "export", *common, "--aggregate", "product", "--answer-line", "step") == 0
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert len(row["step_scores"]) == 3 and row["score"] == pytest.approx(np.prod(row["step_scores"]))


def test_an_adapter_scores_as_its_merged_export(
    runs: dict[str, Path], tiny_model_dir: Path, sampled: tuple[Path, Path], tmp_path: Path
) -> None:
    prompts, samples = sampled
    common = ("--prompts", prompts, "--samples", samples, "--out")
    assert command("--model", tiny_model_dir, "--adapter", runs["lora"] / "adapter", *common, tmp_path / "1") == 0
    assert command("--model", runs["lora"] / "export", *common, tmp_path / "2") == 0
    one, two = ([json.loads(line)["score"] for line in (tmp_path / name).read_text().splitlines()] for name in "12")
    assert one.pop(1) is None and two.pop(1) is None
    assert one == pytest.approx(two, rel=1e-5)


def test_a_model_beside_its_control(
    runs: dict[str, Path], held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's numbers are those of the run's last evaluation, and of plain sums over the rows it writes."""
    argv = ("--model", runs["hard"] / "export", "--control", runs["outcome"] / "export", "--data", held_out)
    assert command(*argv, "--json", tmp_path / "n.json", "--out", tmp_path / "rows.jsonl") == 0
    report = read_json(tmp_path / "n.json")
    assert (report["labels"], report["control"]["labels"]) == ("hard", "outcome (every)")
    last = read_metrics(runs["hard"])[-1]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for name in ("step_accuracy", "step_accuracy_right", "step_accuracy_wrong", "step_auc"):
        assert report[name]["value"] == pytest.approx(last[f"eval_{name}"], abs=1e-6), name
        assert report[name]["low"] <= report[name]["value"] <= report[name]["high"]
        gap = report[name]["value"] - report["control"][name]["value"]
        assert report["difference"][name]["value"] == pytest.approx(gap)
    assert report["steps"] == 21 and report["questions"] == 7
    assert rows[0].keys() == {"id", "score", "step_scores", "hard"}
    assert rows[0]["score"] == pytest.approx(aggregate(rows[0]["step_scores"], "mean"))
    text = capsys.readouterr().out
    assert "21 steps of 7 questions" in text and "model - control" in text


@pytest.mark.parametrize(("argv", "problem"), [
    (("--samples", "S"), "--prompts and --samples go together"),
    (("--data", "D", "--samples", "S", "--prompts", "P"), "give either --prompts and --samples, or --data"),
    ((), "give either --prompts and --samples, or --data"),
    (("--samples", "S", "--prompts", "P"), "--out: needed with --samples"),
    (("--samples", "S", "--prompts", "P", "--out", "O", "--control", "C"), "--control, --json: only with --data"),
])  # fmt: skip
def test_options_that_do_not_go_together(argv: tuple[str, ...], problem: str, capsys) -> None:
    assert command("--model", "M", *argv) == 2
    assert capsys.readouterr().err == f"error: {problem}\n"


def test_input_that_does_not_fit(tiny_model_dir: Path, sampled: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    prompts, samples = sampled
    common = ("--samples", samples, "--out", tmp_path / "out")
    assert command("--model", tiny_model_dir, "--prompts", prompts, *common) == 2
    assert "has no reward head; train one with train.objective = prm" in capsys.readouterr().err
    other = write_rows(tmp_path / "other.jsonl", [{"id": "a", "prompt": "another"}, {"id": "b", "prompt": "x"}])
    assert command("--model", tiny_model_dir, "--prompts", other, *common) == 2
    assert "id 'a' was drawn for another prompt" in capsys.readouterr().err
    one = write_rows(tmp_path / "one.jsonl", [{"id": "a", "prompt": QUESTION}])
    assert command("--model", tiny_model_dir, "--prompts", one, *common) == 2
    assert "id 'b' is not in the file of prompts" in capsys.readouterr().err
    with pytest.raises(UserError, match="--prm-pattern: goes with --prm-split regex"):
        prm.splitter("line", "x", None, "prm-")


def test_the_splitter_keeps_an_answer_that_is_nothing_but_its_line() -> None:
    assert Splitter()("one\ntwo\nThe answer is 3") == ["one\n", "two\n"]
    assert Splitter()("The answer is 3") == ["The answer is 3"]
    assert Splitter(answer_line=None)("one\nThe answer is 3") == ["one\n", "The answer is 3"]
    assert prm.splitter("regex", ";", "step")("a; b;c") == ["a;", " b;", "c"]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_by_hand() -> None:
    scores = [np.array([0.9, 0.4]), np.array([0.6, 0.4, 0.1])]
    hard = [np.array([1.0, 1.0]), np.array([0.0, 0.0, 0.0])]
    found = numbers(scores, hard)
    assert (found["questions"], found["steps"], found["right"]) == (2, 5, 0.4)
    values = [found[name]["value"] for name in MEASURES]
    assert values == pytest.approx([3 / 5, 1 / 2, 2 / 3, 7 / 12, (3 + 1.5) / 6])
    assert found["step_accuracy"] == pytest.approx({"value": 3 / 5, "low": 1 / 2, "high": 2 / 3})
    assert differences(scores, scores, hard)["step_auc"] == {"value": 0, "low": 0, "high": 0}
    only_right = numbers([np.array([0.9])], [np.array([1.0])])
    assert only_right["step_accuracy_wrong"] is None and only_right["step_auc"] is None


def test_auc_is_the_trainers() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores, hard = generator.integers(0, 6, 12) / 5, generator.integers(0, 2, 12).astype(float)
        expected = area_under_curve(scores.tolist(), [label == 1 for label in hard])
        found = measures(scores, hard)[-1]
        assert np.isnan(found) if expected is None else found == pytest.approx(expected)


def test_prompts_and_samples_are_put_together() -> None:
    prompts = [Prompt("a", "Q", {}, "p", 3, "It"), Prompt("b", "R", {}, "p", 4)]
    samples = [
        Sample(id=name, sample=number, text=text, finish_reason="stop", model="m", settings_digest="s",
               prompt_digest=prompt_digest(*prompt))
        for name, number, text, prompt in [("b", 0, " ", ("R",)), ("a", 2, "", ("Q", "It")), ("a", 0, "s", ("Q", "It"))]
    ]  # fmt: skip
    ((answers, taken),) = prm.collect_answers(prompts, samples, "S")
    assert (answers.id, answers.texts, taken, answers.line) == ("a", ("It", "Its"), (2, 0), 3)


# --- best of n -------------------------------------------------------------------------------------------------------


def said(number: int, text: str) -> Sample:
    return Sample(
        id="x", sample=number, text=text, finish_reason="stop", model="m", settings_digest="s", prompt_digest="p"
    )


def item_row(verdicts: list[tuple[str, str | None]], **more: object) -> dict:
    return {"id": "x", "verdicts": [{"verdict": said, "extracted": read} for said, read in verdicts], **more}


def test_best_of_n_and_the_weighted_vote_by_hand() -> None:
    """Means 0.25, 0.875, 0.4, 0.75: the second is best. B has 1.0 against C's 0.875; the third cannot be read."""
    samples = [said(k, text) for k, text in enumerate(["b", "c", "?", "b", " "])]
    verdicts = [("correct", "B"), ("wrong", "C"), ("invalid", None), ("correct", "B"), ("invalid", None)]
    scored = {"step_scores": [[0.125, 0.375], [0.875], [0.4, 0.4], [0.75]]}
    row = with_prm(item_row(verdicts, votes={"B": 2, "C": 1}), samples, scored, "mean")
    assert row["prm_scores"] == [0.25, 0.875, 0.4, 0.75, None]
    assert (row["prm_best"], row["prm_best_score"]) == (1, 0.0)
    assert (row["prm_answer"], row["prm_vote_score"]) == ("B", 1.0)
    by_min = with_prm(item_row(verdicts, votes={}), samples, scored, "min")
    assert (by_min["prm_best"], by_min["prm_answer"]) == (1, "B"), "0.125 + 0.75 is as much as 0.875: B came first"
    programs = with_prm(item_row(verdicts), samples, scored, "mean")
    assert "prm_answer" not in programs and programs["prm_best"] == 1
    nothing = with_prm(item_row(verdicts, votes={}), samples, None, "mean")
    assert (nothing["prm_best"], nothing["prm_best_score"], nothing["prm_vote_score"]) == (None, 0.0, 0.0)


def test_a_task_with_a_process_reward_model(
    runs: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The item's log and the report, from samples drawn elsewhere; a second start scores nothing and says the same."""
    rows = [{"id": name, "question": f"{name}?", "gold": answer} for name, answer in (("p", "7"), ("q", "8"))]
    data = write_rows(tmp_path / "data.jsonl", rows)
    task = tmp_path / "task.toml"
    words = (
        'name = "sums"\nkind = "numeric"\n[fields]\nanswer = "gold"\n[prompt]\ntext = "{question}"\n[sampling]\nn = 3\n'
    )
    task.write_text(words)
    texts = {
        "p": ["3 + 4 = 7\nThe answer is 7.", "The answer is 6.", "2\nThe answer is 6."],
        "q": ["8", "", "The answer is 8."],
    }
    samples = write_samples(tmp_path / "S.jsonl", texts)
    more = ("--samples", samples, "--prm", runs["hard"] / "export")
    assert evaluate_run(task, data, tmp_path / "out", "--samples", samples, "--prm-split", "line") == 2
    assert "--prm-split: only with --prm" in capsys.readouterr().err
    assert evaluate_run(task, data, tmp_path / "none", "--samples", samples, "--prm", tiny_model_dir) == 2
    assert "has no reward head" in capsys.readouterr().err
    assert evaluate_run(task, data, tmp_path / "out", *more) == 0
    log = read_log(tmp_path / "out" / "items.jsonl")
    assert log["q"]["prm_scores"][1] is None and log["q"]["prm_vote_score"] == 1.0
    scored = read_log(tmp_path / "out" / "prm_scores.jsonl")["p"]["step_scores"]
    assert [len(steps) for steps in scored] == [1, 1, 1]
    assert log["p"]["prm_scores"] == pytest.approx([steps[0] for steps in scored])
    assert log["p"]["prm_best"] == int(np.argmax(log["p"]["prm_scores"]))
    result = read_json(tmp_path / "out" / "report.json")["result"]["prm"]
    for name, column in (("best_of_n", "prm_best_score"), ("weighted_vote", "prm_vote_score")):
        assert result[name]["value"] == (log["p"][column] + log["q"][column]) / 2
        assert result[name]["over_vote"]["value"] == pytest.approx(
            result[name]["value"] - (log["p"]["score"] + log["q"]["score"]) / 2
        )
    assert "best of n by process rewards, over 3 samples" in (tmp_path / "out" / "report.md").read_text()
    before = (tmp_path / "out" / "prm_scores.jsonl").read_bytes()
    assert evaluate_run(task, data, tmp_path / "out", *more) == 0
    assert (tmp_path / "out" / "prm_scores.jsonl").read_bytes() == before
    assert evaluate_run(task, data, tmp_path / "out", *more, "--prm-aggregate", "min") == 2
    assert "holds a run with another prm" in capsys.readouterr().err
