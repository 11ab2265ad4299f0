"""The recipe gaokerena_r: its files fit each other; in the long test its small form runs, is killed, and runs again."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from recipe_fixtures import RECIPES, Run, stages_run, steps_of, table

from data_tools.jsonl import write_rows
from data_tools.mixture import read_mixture
from data_tools.pairs.exchange import read_prompt_texts
from data_tools.pairs.leaks import Phrases, leak_of
from data_tools.pipeline import main as pipeline
from data_tools.placeholders import fill, names_in
from data_tools.questions import judge, read_questions
from eval.items import read_items
from eval.task import load_task
from trainer.config import load_config

FOLDER = RECIPES / "gaokerena_r"
SMALL, PUBLISHED = FOLDER / "small.toml", FOLDER / "published.toml"
TASKS = [FOLDER / part / f"{name}.toml" for part in ("", "small") for name in ("student", "cot", "direct")]


@pytest.fixture
def data(shared_dir: Path) -> dict[str, object]:
    """The user's copies."""
    own = shared_dir / "data"
    return {"data": own / "medmcqa_fa/train.jsonl", "eval_data": own / "mmlu_med_fa/test.jsonl"}


def names(recipe: Path, settings: dict[str, object]) -> list[str]:
    return [step.key for step in steps_of(recipe, settings)]


def test_stages_of_both_sizes_are_the_same_but_for_the_teacher(data: dict[str, object], smollm2_dir: Path) -> None:
    """Ten turns at the published scale, two in the small one; the small teacher is a replay."""
    small = names(SMALL, {**data, "model": smollm2_dir})
    published = names(PUBLISHED, {**data, "model": smollm2_dir, "turns": 2})
    assert [name.replace("-replay", "") for name in small] == published
    assert "correct-replay" in small and "correct" in published
    assert len(names(PUBLISHED, {**data, "model": smollm2_dir})) == len(published) + 8 * 5
    translating = names(PUBLISHED, {**data, "model": smollm2_dir, "translate": "true"})
    assert translating[:9] == [
        "source",
        "translate-requests",
        "translate",
        "translate-read",
        "translate-again",
        "translate-rows",
        "referee-requests",
        "referee-one",
        "referee-two",
    ]


def test_one_setting_makes_the_teacher_a_server_a_model_or_a_recording(
    data: dict[str, object], smollm2_dir: Path
) -> None:
    def command(recipe: Path, **more: object) -> Sequence[str]:
        steps = {step.stage.name: step for step in steps_of(recipe, {**data, "model": smollm2_dir, **more})}
        return (steps.get("correct") or steps["correct-replay"]).command[1:6]

    assert command(PUBLISHED)[3:] == ("deepseek-reasoner", "--url")
    assert command(PUBLISHED, teacher_server="[]", teacher_model=smollm2_dir)[3:] == (str(smollm2_dir), "--prompts")
    assert command(PUBLISHED, teacher_replay=data["data"])[1] == "data_tools.replay"
    assert command(SMALL)[1] == "data_tools.replay"
    assert command(SMALL, teacher_model="M", teacher_server='["--url", "http://localhost:1/v1"]')[3:] == ("M", "--url")


@pytest.mark.parametrize("recipe", [SMALL, PUBLISHED])
def test_the_plan_runs_nothing(
    recipe: Path, data: dict[str, object], smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**data, "model": smollm2_dir, "work": tmp_path / "work"}
    sets = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    assert pipeline([str(recipe), *sets, "--plan"]) == 0
    out = capsys.readouterr().out
    assert "trained-cot" in out and "0 of " in out
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("key", "said"), [("data", "Gaokerena-R (CC BY-NC-SA 4.0)"), ("eval_data", "MMLU_fa")])
def test_a_missing_file_says_where_the_set_is_published(
    key: str, said: str, data: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ("", tmp_path / "none.jsonl"):
        settings = {**data, key: value, "work": tmp_path / "work"}
        sets = [text for name, own in settings.items() for text in ("--set", f"{name}={own}")]
        assert pipeline([str(SMALL), *sets, "--plan"]) == 2
        assert said in capsys.readouterr().err


def test_training_is_what_the_published_log_says() -> None:
    own = table(FOLDER / "train.toml")
    assert (own["lora"]["r"], own["lora"]["alpha"], own["lora"]["dropout"]) == (16, 16, 0.05)
    assert (own["loss"]["loss_type"], own["loss"]["beta"], own["reference"]["mode"]) == ("sigmoid", 0.1, "model")
    train = own["train"]
    assert (train["learning_rate"], train["warmup_ratio"], train["global_batch"], train["epochs"]) == (1e-6, 0.03, 4, 1)
    for part in ("", "small"):
        given = ["--model.path=m", "--data.train=d", "--run.dir=r"]
        assert load_config([str(FOLDER / part / "train.toml"), *given]).loss.beta == 0.1
        mixture = read_mixture(FOLDER / part / "mixture.toml", "w")
        assert [own.weight for own in mixture.sources] == [95, 5]


@pytest.mark.parametrize("part", ["", "small"])
def test_student_and_evaluation_are_asked_in_one_and_the_same_words(part: str) -> None:
    """The published code trained on another template than it was asked in."""
    student, cot = (load_task(FOLDER / part / f"{name}.toml") for name in ("student", "cot"))
    assert student.prompt == cot.prompt
    assert (student.sampling.n, cot.sampling.n, cot.vote.threshold, cot.vote.ties) == (1, 5, 3, "abstain")
    assert cot.score.k == (1, 2, 3)


@pytest.mark.parametrize("path", TASKS, ids=[f"{own.parent.name}-{own.stem}" for own in TASKS])
def test_tasks_fill_in_real_questions(path: Path, data: dict[str, object], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(str(data["eval_data"])).read_text(encoding="utf-8").splitlines()[:5]]
    write_rows(tmp_path / "q.jsonl", rows)
    task = load_task(path)
    for item, row in zip(read_items(task, tmp_path / "q.jsonl"), rows, strict=True):
        said = fill(task.prompt.text, item.values)
        assert row["question"] in said and f"[A] : {row['options']['A']}" in said
        assert not names_in(task.verifier.text) - {"question", "answers", "n"}


def test_prompts_have_what_builders_give(data: dict[str, object]) -> None:
    """Placeholders of every table are known, and the worded answer line is read as the option it names."""
    tables = ("translate", "terms", "teacher_correct", "critique", "retry", "retry_different")
    texts = read_prompt_texts(FOLDER / "prompts.toml", tables)
    known = {"question", "options", "gold", "gold_text", "explanation", "student"}
    allowed = {
        "translate": {"fields"},
        "terms": {"source", "translation"},
        "teacher_correct": known,
        "critique": known,
        "retry": {"critique"},
        "retry_different": {"critique", "tried"},
    }
    assert {name: names_in(own.text) for name, own in texts.items()} == allowed
    question = read_questions(str(data["data"]), "option")[0]
    for label in question.options:
        read = judge(question, f"دلیل این است.\nپاسخ: [{label}]")
        assert (read.verdict == "correct") == (label == question.gold) and read.verdict != "invalid"


def test_the_stand_in_for_a_teacher_neither_leaks_nor_reads_as_a_correction(data: dict[str, object]) -> None:
    settings = table(SMALL)["settings"]
    questions = read_questions(str(data["data"]), "option")[:200]
    assert all(leak_of(settings["replay_critique"], question) is None for question in questions)
    assert Phrases().found_in(settings["replay_answer"]) is None


@pytest.mark.long
def test_small_recipe_from_data_to_report_killed_and_again(
    data: dict[str, object], smollm2_dir: Path, tmp_path: Path
) -> None:
    """kill -9 while the student samples; the same command goes on; a third one has nothing to do."""
    settings = {**data, "model": smollm2_dir, "questions": 6, "eval_items": 3, "turns": 1}
    recipe = Run(SMALL, settings, tmp_path / "work")
    recipe.killed_once_there_is(recipe.work / "turn0/samples.jsonl")
    out = recipe.run()
    assert stages_run(out)[0] == "answer" and stages_run(out)[-1] == "compare-cot"
    assert stages_run(recipe.run()) == []
    pairs = [json.loads(line) for line in (recipe.work / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pairs and all(pair["verified"]["chosen"] == "correct" for pair in pairs)
    samples = [json.loads(line) for line in (recipe.work / "turn0/samples.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in samples}) == len(samples) == 6
    for kind in ("direct", "cot"):
        own = json.loads((recipe.work / f"eval/mmlu_fa/trained_{kind}/report.json").read_text())
        assert own
        assert (recipe.work / f"eval/mmlu_fa/compare_{kind}.json").is_file()
    made = json.loads((recipe.work / "provenance.json").read_text())
    assert "train" in {stage["stage"] for stage in made["stages"]}
