"""Questions without pairs: right, of one part each, and enough of them."""

import json
import re
from pathlib import Path

import pytest

from data_tools.pairs.arithmetic_questions import ALL_TEMPLATES, PARTS, main, questions
from data_tools.questions import judge, read_questions


def test_parts_share_no_instance_whatever_the_seed() -> None:
    """Two questions of the same template and numbers differ in names only: numbers and template tell them."""
    found: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for part in PARTS:
        for seed in (0, 1, 2):
            for row in questions(part, 100, [1], seed=seed):
                key = (row["template"], tuple(re.findall(r"\d+", row["question"])))
                found.setdefault(key, set()).add(part)
    assert len(found) > 300
    assert all(len(parts) == 1 for parts in found.values())


@pytest.mark.parametrize("steps", [[1], [2], [1, 2, 3]])
def test_answers_and_solutions_are_right(steps: list[int], tmp_path: Path) -> None:
    assert main(["--out-dir", str(tmp_path / "new"), "--steps", *map(str, steps), "--test", "40", "--seed", "3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "new" / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and {row["steps"] for row in rows} == set(steps)
    asked = read_questions(tmp_path / "new" / "test.jsonl", "number")
    for row, question in zip(rows, asked, strict=True):
        assert judge(question, row["solution"]).verdict == "correct"
        calculations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["solution"])
        assert len(calculations) == row["steps"]
        for left, operator, right, result in calculations:
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}.get(
                operator, int(left) // int(right)
            ) == int(result)


def test_templates_come_in_turn_and_give_way_when_used_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one_step = [template.key for template in ALL_TEMPLATES if len(template.steps) == 1]
    rows = list(questions("test", 2 * len(one_step), [1], seed=0))
    assert [row["template"] for row in rows] == 2 * one_step
    assert main(["--out-dir", str(tmp_path), "--test", "9999"]) == 2
    assert "no new problem after" in capsys.readouterr().err
    assert main(["--out-dir", str(tmp_path), "--steps", "9"]) == 2
    assert "no such problems" in capsys.readouterr().err
