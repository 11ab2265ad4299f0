"""The medcritical recipes: their files fit each other, plans use real data, the small one runs through a kill."""

from pathlib import Path

import pytest
from recipe_fixtures import RECIPES, Run, stages_run
from recipe_text_fixtures import check_texts, fault_of, plan_of, rows_of

from data_tools.pairs.exchange import read_prompt_texts
from data_tools.pairs.self_correct import hint_of
from data_tools.steps import ANSWER_LINE
from data_tools.verify_option import verify_option
from eval.task import load_task
from trainer.config import load_config

FOLDER = RECIPES / "medcritical"
TEACHERS = ("teacher_concise", "teacher_long", "teacher_blind")


def test_one_prompt_is_trained_sampled_and_evaluated() -> None:
    asked = read_prompt_texts(FOLDER / "prompts.toml", ["answer"])["answer"].text
    for name in TEACHERS:
        assert read_prompt_texts(FOLDER / f"{name}.toml", ["distill", "train"])["train"].text == asked
    assert read_prompt_texts(FOLDER / "prompts_no_key.toml", ["answer"])["answer"].text == asked
    for name in ("written", "written_small"):
        assert load_task(str(FOLDER / f"{name}.toml")).prompt.text == asked


def test_who_sees_the_key() -> None:
    hints = {}
    for name, table in (
        *((own, "distill") for own in TEACHERS),
        ("prompts", "self_correct"),
        ("prompts_no_key", "self_correct"),
    ):
        hints[name] = hint_of(read_prompt_texts(FOLDER / f"{name}.toml", [table])[table])
    assert [name for name, hint in hints.items() if hint == "none"] == ["teacher_blind", "prompts_no_key"]
    assert hint_of(read_prompt_texts(FOLDER / "prompts.toml", ["answer"])["answer"]) == "none"


def test_the_closing_that_is_asked_for_is_read(shared_dir: Path) -> None:
    """As the template of small.toml writes it, and as a line of steps."""
    rows = rows_of(shared_dir / "data" / "cmexam" / "train.jsonl")[:100]
    template = "<think>\n{explanation}\n</think>\n<answer>\n答案是{gold}。{gold_text}\n</answer>"
    assert f'template = "{template}"'.replace("\n", "\\n") in (FOLDER / "published.toml").read_text(encoding="utf-8")
    for row in rows:
        gold = row["answer"]
        text = template.format(explanation=row["explanation"], gold=gold, gold_text=row["options"][gold])
        assert verify_option(text, gold, row["options"]).verdict == "correct", row["id"]
    assert ANSWER_LINE.match("答案是B。")


def test_the_second_stage_is_as_published() -> None:
    dpo = load_config([str(FOLDER / "dpo.toml"), "--model.path=m", "--data.train=d"])
    assert (dpo.loss.beta, dpo.train.learning_rate, dpo.train.epochs, dpo.train.global_batch) == (0.3, 1e-5, 10, 16)
    assert (dpo.lora.r, dpo.lora.alpha, dpo.train.schedule, dpo.train.warmup_ratio) == (8, 16, "cosine", 0.05)
    assert dpo.data.max_length == 2048 and dpo.reference.path is None  # the model that it starts from
    assert load_config([str(FOLDER / "sft.toml"), "--model.path=m", "--data.train=d"]).data.max_length > 10_000


def test_a_plan_at_the_published_scale(
    shared_dir: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [f"data={shared_dir}/data/cmexam/train.jsonl", f"model={tiny_model_dir}"]
    sets += ["teacher=T", 'teacher_place=["--url", "http://localhost:1/v1"]']
    stages = plan_of(FOLDER / "published.toml", tmp_path / "w", capsys, *sets)
    assert {"split_four", "sample_teacher", "correct [round 3]", "dpo [round 3]", "report"} <= set(stages)
    assert not {"replay_teacher", "own_explanations", "correct_by_teacher [round 1]"} & set(stages)
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "x", "text": "y"}\n')
    more = (f"replay={answers}", "teacher_corrects=true", f"judge={tiny_model_dir}")
    stages = plan_of(FOLDER / "published.toml", tmp_path / "w", capsys, *sets, *more)
    assert {"replay_teacher", "correct_by_teacher [round 1]", "test_judged_best", "report_with_judge"} <= set(stages)
    assert not {"sample_teacher", "correct [round 1]"} & set(stages)


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("published", "small"):
        said = fault_of(FOLDER / f"{name}.toml", tmp_path, capsys)
        assert "setting 'data' is empty: CMExam's" in said and "williamliujl/CMExam, Apache-2.0, research use" in said
    said = fault_of(FOLDER / "small.toml", tmp_path, capsys, "data=no.jsonl")
    assert "no.jsonl: no such file or folder; setting 'data': CMExam's" in said


def test_the_texts_of_every_stage_can_be_filled(shared_dir: Path) -> None:
    rows = shared_dir / "data" / "cmexam" / "train.jsonl"
    for name in TEACHERS:
        check_texts(FOLDER / f"{name}.toml", ["distill", "train"], rows, "option")
    more = {"student": "s", "correct_steps": "c", "wrong_step": "w"}
    check_texts(FOLDER / "prompts.toml", ["answer", "self_correct", "self_correct_step"], rows, "option", **more)
    check_texts(FOLDER / "prompts_no_key.toml", ["answer", "self_correct"], rows, "option", **more)


@pytest.mark.long
def test_the_small_recipe_from_questions_to_a_report(smollm2_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    data = {"data": shared_dir / "data" / "cmexam" / "train.jsonl"}
    recipe = Run(FOLDER / "small.toml", data, tmp_path / "work")
    recipe.killed_once_there_is(recipe.work / "round1" / "samples.jsonl")
    recipe.run()
    report = (recipe.work / "report.md").read_text(encoding="utf-8")
    runs = [f"/test/{kind}_{name} " for kind in ("option", "written") for name in ("base", "stage1", "best")]
    assert all(name in report for name in runs)
    pairs = rows_of(recipe.work / "round1" / "pairs.jsonl")
    assert pairs and all(row["verified"]["chosen"] == "correct" for row in pairs)
    assert {row["made_by"]["chosen"]["source"] for row in pairs} == {"self"}
    again = recipe.run()
    assert "0 stages run" in again and stages_run(again) == []
