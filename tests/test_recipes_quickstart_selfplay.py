"""The quickstart_selfplay recipe: its files belong together, and the whole of it runs through a kill, small."""

import json
from pathlib import Path

import pytest
from recipe_fixtures import RECIPES, Run, stages_run, steps_of

from data_tools.pairs.exchange import read_prompt_texts
from eval.task import load_task
from trainer.config import load_config

FOLDER = RECIPES / "quickstart_selfplay"


def test_both_evaluations_ask_what_was_sampled() -> None:
    greedy, sampled = (load_task(str(FOLDER / f"{name}.toml")) for name in ("task", "task_sampled"))
    assert greedy.prompt == sampled.prompt
    assert read_prompt_texts(FOLDER / "prompts.toml", ["answer"])["answer"].text == greedy.prompt.text
    assert (greedy.sampling.temperature, sampled.sampling.temperature) == (0.0, 1.0)
    assert (greedy.sampling.n, greedy.sampling.stop) == (sampled.sampling.n, sampled.sampling.stop) == (1, ("\n",))


def test_trainings_fit_in_one_table() -> None:
    model = ["--model.path=m", "--data.train=d"]
    found = {name: load_config([str(FOLDER / f"{name}.toml"), *model]) for name in ("dpo", "orpo", "sft")}
    assert {name: own.train.objective for name, own in found.items()} == {"dpo": "dpo", "orpo": "orpo", "sft": "sft"}
    shared = {(own.train.global_batch, own.train.epochs, own.data.max_length) for own in found.values()}
    assert len(shared) == 1  # the same rows, in the same number of passes


def test_rounds_and_controls_are_settings(smollm2_dir: Path, tmp_path: Path) -> None:
    common = {"model": smollm2_dir, "work": tmp_path / "work"}
    names = [step.stage.name for step in steps_of(FOLDER / "small.toml", {**common, "rounds": 2})]
    assert names.count("sample") == 2 and {"train_other", "train_rft", "train_sft", "table"} <= set(names)
    plain = {step.stage.name for step in steps_of(FOLDER / "small.toml", {**common, "controls": "false"})}
    assert "short_table" in plain and not plain & {"train_other", "train_rft", "train_sft", "solutions", "table"}


@pytest.mark.long
def test_from_questions_to_a_table(smollm2_dir: Path, tmp_path: Path) -> None:
    """12 questions: enough for every stage, too few for a number."""
    settings = {"model": smollm2_dir, "train": 16, "dev": 8, "test": 8, "temperature": 0.6}
    recipe = Run(FOLDER / "small.toml", settings, tmp_path / "work")
    recipe.killed_once_there_is(recipe.work / "round1" / "samples.jsonl")
    recipe.run()
    assert "trained_greedy" in (recipe.work / "results.md").read_text(encoding="utf-8")
    report = json.loads((recipe.work / "test" / "trained_sampled" / "report.json").read_text(encoding="utf-8"))
    assert report["baseline"] is not None
    assert stages_run(recipe.run()) == []
