"""The recipe meerkat: its files fit each other; in the long test its small form runs, is killed, and runs again."""

import json
import re
from pathlib import Path

import pytest
from recipe_fixtures import RECIPES, Run, stages_run, steps_of, table

from data_tools.mixture import read_mixture
from data_tools.pairs.exchange import read_prompt_texts
from data_tools.pipeline import main as pipeline
from data_tools.placeholders import fill, names_in
from data_tools.questions import judge, read_questions
from eval.task import load_task
from trainer.config import load_config

FOLDER = RECIPES / "meerkat"
SMALL, PUBLISHED = FOLDER / "small.toml", FOLDER / "published.toml"
SETS = ("medqa", "mmlu", "medmcqa")


@pytest.fixture
def data(shared_dir: Path) -> dict[str, object]:
    """The user's copies."""
    own = shared_dir / "data"
    return {
        "data": own / "medqa/train.jsonl",
        "answers": own / "medmcqa/train.jsonl",
        "passages": own / "textbook_openstax_ap/passages.jsonl",
        "eval_medqa": own / "medqa/test.jsonl",
        "eval_mmlu": own / "mmlu_med/test.jsonl",
        "eval_medmcqa": own / "medmcqa/test.jsonl",
    }


def test_stages_of_both_sizes_are_the_same(data: dict[str, object], smollm2_dir: Path) -> None:
    small, published = ([s.key for s in steps_of(r, {**data, "model": smollm2_dir})] for r in (SMALL, PUBLISHED))
    assert [name.replace("replay-questions", "write-questions") for name in small] == published
    asking = [step.key for step in steps_of(SMALL, {**data, "model": smollm2_dir, "writer_replay": ""})]
    assert asking == published
    assert {f"contamination-{name}" for name in SETS} | {f"compare-{name}" for name in SETS} < set(small)
    talking = [step.key for step in steps_of(SMALL, {**data, "model": smollm2_dir, "dialogue": data["answers"]})]
    assert set(talking) - set(small) == {"dialogue", "mix-dialogue"}


def test_the_teacher_is_a_server_or_a_model(data: dict[str, object], smollm2_dir: Path) -> None:
    def command(recipe: Path, **more: object) -> tuple[str, ...]:
        steps = {step.key: step for step in steps_of(recipe, {**data, "model": smollm2_dir, **more})}
        return steps["cot-answers"].command[3:6]

    assert command(PUBLISHED) == ("--model", "gpt-4-0613", "--url")
    assert command(SMALL) == ("--model", "models/SmolLM2-135M-Instruct", "--prompts")
    assert command(SMALL, teacher_server='["--url", "http://localhost:1/v1"]')[2] == "--url"


@pytest.mark.parametrize("recipe", [SMALL, PUBLISHED])
def test_the_plan_runs_nothing(
    recipe: Path, data: dict[str, object], smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**data, "model": smollm2_dir, "work": tmp_path / "work"}
    sets = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    assert pipeline([str(recipe), *sets, "--plan"]) == 0
    assert "trained-medmcqa" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("key", "said"), [("data", "jind11/MedQA"), ("answers", "medmcqa"), ("passages", "CC BY 4.0"), ("eval_mmlu", "MIT")]
)
def test_a_missing_file_says_where_the_set_is_published(
    key: str, said: str, data: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in ("", tmp_path / "none.jsonl"):
        settings = {**data, key: value, "work": tmp_path / "work"}
        sets = [text for name, own in settings.items() for text in ("--set", f"{name}={own}")]
        assert pipeline([str(SMALL), *sets, "--plan"]) == 2
        assert said in capsys.readouterr().err


def test_training_rows_and_evaluation_are_asked_in_one_and_the_same_words() -> None:
    """User's text and system message of a row are those of the task that the source prepares for."""
    train = read_prompt_texts(FOLDER / "prompts.toml", ["train"])["train"]
    answers = read_prompt_texts(FOLDER / "answers.toml", ["distill"])["distill"]
    for name in ("mixture", "mixture_dialogue"):
        systems = {own.name: own.system for own in read_mixture(FOLDER / f"{name}.toml", "w").sources}
        for part in ("", "small"):
            cot, answer = (load_task(FOLDER / part / f"{kind}.toml").prompt for kind in ("cot", "answer"))
            assert (cot.text, answer.text) == (train.text, answers.text)
            assert cot.system == systems["cot"] == systems["textbook"]
            assert answer.system == systems["answers"]
            assert cot.option == answer.option == "({label}) {text}"
    assert systems["dialogue"] is None


def test_both_tasks_draw_as_many_samples_of_base_and_trained(data: dict[str, object], smollm2_dir: Path) -> None:
    for part in ("", "small"):
        cot, answer = (load_task(FOLDER / part / f"{kind}.toml") for kind in ("cot", "answer"))
        assert cot.sampling.n == answer.sampling.n > 1
        assert (cot.vote.threshold, cot.vote.ties) == (1, "first")
    steps = {step.key: step for step in steps_of(SMALL, {**data, "model": smollm2_dir})}
    for name in SETS:
        base, trained = (steps[f"{who}-{name}"].command for who in ("base", "trained"))
        assert base[: base.index("--model")] == trained[: trained.index("--model")]


def test_training_settings_load() -> None:
    for part in ("", "small"):
        config = load_config([str(FOLDER / part / "train.toml"), "--model.path=m", "--data.train=d", "--run.dir=r"])
        assert (config.train.objective, config.train.epochs, config.lora.r) == ("sft", 3, 0)


def test_prompts_have_what_commands_give_and_the_hint_is_in_the_small_ones_only() -> None:
    texts = read_prompt_texts(FOLDER / "prompts.toml", ("question", "distill", "train"))
    assert names_in(texts["question"].text) == {"titles", "text", "count", "options", "format"}
    assert names_in(texts["distill"].text) == names_in(texts["train"].text) == {"question", "options"}
    hint = read_prompt_texts(FOLDER / "small/hint.toml", ["distill"])["distill"]
    assert {"gold", "gold_text"} < names_in(hint.text)


def test_answers_alone_are_read_as_the_known_option_and_close_as_asked(data: dict[str, object]) -> None:
    """All real rows: the text of `answer_text` has the closing phrase and is judged correct."""
    text = table(SMALL)["settings"]["answer_text"]
    (rows,) = (stage for stage in table(SMALL)["stage"] if stage["name"] == "answer-rows")
    closing = re.compile(rows["command"][rows["command"].index("--closing") + 1])
    questions = read_questions(str(data["answers"]), "option")
    verdicts = []
    for question in questions:
        said = fill(text, question.values)
        assert closing.search(said.splitlines()[-1])
        verdicts.append(judge(question, said).verdict)
    assert verdicts.count("correct") >= 0.97 * len(questions) and "wrong" not in verdicts


def test_the_small_recipes_own_passages_and_questions_are_read_whole(
    data: dict[str, object], smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three passages, two questions each; no model is needed as far as what the teacher is to be asked."""
    settings = {name: value for name, value in data.items() if name != "passages"}
    settings |= {"model": smollm2_dir, "work": tmp_path / "work"}
    sets = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    for stage in ("passages", "chunks", "question-requests", "replay-questions", "questions", "book-requests"):
        assert pipeline([str(SMALL), *sets, "--only", stage]) == 0
    questions = read_questions(tmp_path / "work/book/questions.jsonl", "option")
    assert len(questions) == 6 and sorted(own.gold or "" for own in questions) == ["A", "A", "B", "C", "C", "D"]
    assert "6 questions in " in capsys.readouterr().out


@pytest.mark.long
def test_small_recipe_from_data_to_report_killed_and_again(
    data: dict[str, object], smollm2_dir: Path, tmp_path: Path
) -> None:
    """kill -9 while the teacher samples; the same command goes on; a third one has nothing to do."""
    settings = {**data, "model": smollm2_dir, "teacher_model": smollm2_dir, "questions": 6, "eval_items": 2}
    recipe = Run(SMALL, settings, tmp_path / "work")
    recipe.killed_once_there_is(recipe.work / "cot/samples.jsonl")
    out = recipe.run()
    assert stages_run(out)[0] == "cot-answers" and stages_run(out)[-1] == "compare-medmcqa"
    assert stages_run(recipe.run()) == []
    rows = [json.loads(line) for line in (recipe.work / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"cot", "answers"} <= {row["source"] for row in rows} <= {"cot", "textbook", "answers"}
    assert all(row["messages"][0]["role"] == "system" and row["verified"] == "correct" for row in rows)
    for name in SETS:
        assert (recipe.work / f"eval/trained_{name}/report.html").is_file()
        assert (recipe.work / f"eval/compare_{name}.json").is_file()
        assert (recipe.work / f"contamination_{name}.json").is_file()
