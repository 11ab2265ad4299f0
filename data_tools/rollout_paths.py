"""An answer in steps, as `rollouts` writes and reads it, and known solutions as such. Nothing is asked here."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_tools.errors import DataError, check_each
from data_tools.jsonl import iter_jsonl
from data_tools.pairs.exchange import prompt_json
from data_tools.schema import Text, check_prompt
from data_tools.steps import split_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPath:
    """steps and rest together are the answer; correct: the verdict on it; gold: a known solution."""

    id: str
    question_id: str
    prompt: Text
    steps: tuple[str, ...]
    rest: str
    correct: bool
    gold: bool = False
    round: int = 0
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def prefix(self, step: int) -> str:
        """The answer up to the end of a step, counted from 0."""
        return "".join(self.steps[: step + 1])

    def row(self) -> dict[str, Any]:
        """As a row of JSON."""
        return {
            "id": self.id,
            "question_id": self.question_id,
            "prompt": prompt_json(self.prompt),
            "steps": list(self.steps),
            "rest": self.rest,
            "correct": self.correct,
            "gold": self.gold,
            "round": self.round,
            "made_by": dict(self.made_by),
        }


def gold_paths(
    texts: Mapping[str, Mapping[str, Any]],
    prompts: Mapping[str, Text],
    column: str,
    drop: re.Pattern[str] | None,
    cut: Mapping[str, Any],
    dropped: Counter[str],
) -> list[StepPath]:
    """Known solutions of the questions that have answers, with these answers' prompt. cut: options of `split_steps`."""
    found = []
    for name, prompt in sorted(
        prompts.items(), key=lambda item: list(texts).index(item[0]) if item[0] in texts else -1
    ):
        text = texts.get(name, {}).get(column)
        if not isinstance(text, str):
            dropped["without a known solution"] += 1
            continue
        steps = split_steps(drop.sub("", text) if drop is not None else text, **cut)
        if not steps.steps:
            dropped["a known solution without a step"] += 1
            continue
        whose = {"made_by": {"known": name}, "correct": True, "gold": True}
        found.append(
            StepPath(id=f"{name}#gold", question_id=name, prompt=prompt, steps=steps.steps, rest=steps.rest, **whose)
        )
    return found


def read_paths(path: str) -> list[StepPath]:
    """Every row, checked. Raises DataErrors; a file of no bytes holds none."""
    wanted = {"id": str, "question_id": str, "steps": list, "rest": str, "correct": bool, "gold": bool, "round": int}
    seen: set[str] = set()

    def check(row: tuple[int, object]) -> StepPath:
        line, value = row
        if not isinstance(value, dict):
            raise DataError(path, line, field=None, problem=f"expected an object, got {type(value).__name__}")
        for name, kind in wanted.items():
            if not isinstance(value.get(name), kind):
                raise DataError(path, line, field=name, problem="is missing or of another kind: these are no paths")
        steps = value["steps"]
        if not steps or not all(isinstance(step, str) and step.strip() for step in steps):
            raise DataError(path, line, field="steps", problem="expected texts, none of them blank")
        if value["id"] in seen:
            raise DataError(path, line, field="id", problem=f"'{value['id']}' stands twice")
        seen.add(value["id"])
        prompt = check_prompt({"prompt": value.get("prompt")}, path=path, line=line).prompt
        kept = {name: value[name] for name in wanted if name != "steps"}
        made_by = value.get("made_by") if isinstance(value.get("made_by"), dict) else {}
        return StepPath(prompt=prompt, steps=tuple(steps), made_by=made_by, **kept)

    return check_each(iter_jsonl(path, may_be_empty=True), check)
