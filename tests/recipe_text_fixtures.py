"""Whether the texts of a recipe can be filled in from real questions, and the stages that its plan shows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_tools.pairs.carried import values_of
from data_tools.pairs.exchange import read_prompt_texts
from data_tools.pipeline import main as pipeline
from data_tools.questions import Kind, read_questions


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plan_of(recipe: Path, work: Path, capsys: pytest.CaptureFixture[str], *sets: str) -> list[str]:
    """The stages of `--plan`, by their labels; nothing may be written."""
    assert pipeline([str(recipe), "--plan", *options(work, *sets)]) == 0, capsys.readouterr().err
    assert not work.exists()
    lines = capsys.readouterr().out.splitlines()[1:-1]
    return [line.partition("  ")[0] for line in lines]


def fault_of(recipe: Path, work: Path, capsys: pytest.CaptureFixture[str], *sets: str) -> str:
    """The one line of a plan that cannot be made."""
    assert pipeline([str(recipe), "--plan", *options(work, *sets)]) == 2
    return capsys.readouterr().err


def options(work: Path, *sets: str) -> list[str]:
    return [word for own in (f"work={work}", *sets) for word in ("--set", own)]


def check_texts(prompts: Path, tables: Sequence[str], questions: Path, kind: Kind, **more: str) -> None:
    """Every text of these tables can be filled in for every question; the question's own text is in it."""
    for text in read_prompt_texts(prompts, tables).values():
        for question in read_questions(questions, kind)[:50]:
            filled = text.messages(values_of(question, **more))
            assert str(question.values["question"]).strip() in filled[-1].content, (prompts, question.id)
