"""The sipf recipes: their files belong together, plans are made of real data, and the small one runs through a kill."""

from pathlib import Path

import pytest
from recipe_fixtures import RECIPES, Run, stages_run
from recipe_text_fixtures import check_texts, fault_of, plan_of, rows_of

from data_tools.pairs.exchange import read_prompt_texts
from eval.task import load_task
from trainer.config import load_config

FOLDER = RECIPES / "sipf"


def test_a_task_asks_what_was_trained() -> None:
    """An evaluation with another prompt than the training rows' measures how well a model takes a new prompt."""
    for task, prompts in (("arithmetic", "arithmetic"), ("gsm8k", "gsm8k"), ("mbpp", "code")):
        asked = read_prompt_texts(FOLDER / f"prompts_{prompts}.toml", ["answer"])["answer"].text
        for kind in ("greedy", "vote"):
            assert load_task(str(FOLDER / f"{task}_{kind}.toml")).prompt.text == asked


def test_trainings_are_as_published() -> None:
    model = ["--model.path=m", "--data.train=d"]
    found = {name: load_config([str(FOLDER / f"{name}.toml"), *model]) for name in ("sft", "orpo", "dpo", "prm")}
    rates = {name: (own.train.learning_rate, own.train.epochs, own.train.global_batch) for name, own in found.items()}
    assert rates == {"sft": (2e-4, 8, 20), "orpo": (8e-5, 8, 20), "dpo": (8e-5, 8, 20), "prm": (5e-5, 10, 40)}
    lora = {name: (own.lora.r, own.lora.alpha, own.lora.dropout, own.model.quantise) for name, own in found.items()}
    assert lora.pop("prm") == (16, 32, 0.05, "nf4") and set(lora.values()) == {(256, 128, 0.05, "nf4")}
    assert {own.train.max_grad_norm for own in found.values()} == {0.3} and found["orpo"].loss.beta == 0.1


@pytest.mark.parametrize(("recipe", "folder"), [("published", "gsm8k"), ("published_code", "mbpp")])
def test_a_plan_at_the_published_scale(
    recipe: str,
    folder: str,
    shared_dir: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sets = [f"{name}={shared_dir}/data/{folder}/{file}.jsonl" for name, file in (("data", "train"), ("test", "test"))]
    sets += [f"{name}={tiny_model_dir}" for name in ("model", "simulator", "prm_model")]
    stages = plan_of(FOLDER / f"{recipe}.toml", tmp_path / "w", capsys, *sets)
    assert {"split_two", "take_test", "orpo [round 3]", "control_dpo", "prm_numbers", "test_best_of_n"} <= set(stages)
    assert not {"make_questions", "start_warm", "roll_server [round 1, roll 1]"} & set(stages)
    other = ("go_on=true", "controls=false", "simulator_url=http://localhost:1/v1")
    stages = plan_of(FOLDER / f"{recipe}.toml", tmp_path / "w", capsys, *sets, *other)
    assert {"orpo_go_on [round 1]", "roll_server [round 1, roll 1]", "report"} <= set(stages)
    assert not {"orpo [round 1]", "control_dpo"} & set(stages)


def test_the_small_recipe_makes_its_questions_or_takes_the_users(
    shared_dir: Path, smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = plan_of(FOLDER / "small.toml", tmp_path / "w", capsys)
    assert "make_questions" in stages and "split_three" not in stages and "start_warm" in stages
    gsm8k = [f"data={shared_dir}/data/gsm8k/train.jsonl", "solution={answer}", "solution_column=answer"]
    stages = plan_of(FOLDER / "small.toml", tmp_path / "w", capsys, *gsm8k)
    assert "split_three" in stages and "make_questions" not in stages


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fault_of(FOLDER / "published.toml", tmp_path, capsys)
    assert "setting 'data' is empty: GSM8K's training rows (openai/grade-school-math, MIT)" in said


def test_the_texts_of_every_stage_can_be_filled(shared_dir: Path) -> None:
    for name in ("gsm8k", "arithmetic"):
        check_texts(
            FOLDER / f"prompts_{name}.toml", ["answer"], shared_dir / "data" / "gsm8k" / "train.jsonl", "number"
        )
    check_texts(FOLDER / "prompts_code.toml", ["answer"], shared_dir / "data" / "mbpp" / "train.jsonl", "code")


@pytest.mark.long
def test_the_small_recipe_from_questions_to_a_report(smollm2_dir: Path, tmp_path: Path) -> None:
    recipe = Run(FOLDER / "small.toml", {}, tmp_path / "work")
    recipe.killed_once_there_is(recipe.work / "round1" / "draw1" / "samples.jsonl")
    recipe.run()
    report = (recipe.work / "report.md").read_text(encoding="utf-8")
    assert all(f"/test/{name} " in report for name in ("base", "warm", "best", "control_dpo", "control_rft"))
    assert "by reward: best of n" in report
    assert rows_of(recipe.work / "round1" / "pairs.jsonl") and rows_of(recipe.work / "held_out" / "labels.jsonl")
    again = recipe.run()
    assert "0 stages run" in again and stages_run(again) == []
