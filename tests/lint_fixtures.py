"""Pairs for tests of the lint: generated problems whose sides differ in numbers only, changed where a cue is planted.

Not a test itself.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_fixtures import write_rows

from data_tools import lint
from data_tools.pairs import arithmetic

Row = dict[str, Any]


def arithmetic_rows(count: int) -> list[Row]:
    return list(arithmetic.generate(count, held_out=False, seed=0))


def said(row: Mapping[str, Any], side: str) -> str:
    return str(row[side][0]["content"])


def with_text(row: Row, side: str, change: Callable[[str], str]) -> Row:
    role = "user" if side == "prompt" else "assistant"
    return row | {side: [{"role": role, "content": change(said(row, side))}]}


def run_lint(tmp_path: Path, rows: Sequence[Mapping[str, Any]], *options: object) -> tuple[int, dict[str, Any]]:
    """Exit code of the command and its JSON file."""
    pairs, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "lint.json"
    code = lint.main([str(pairs), "--json", str(out), *map(str, options)])
    return code, json.loads(out.read_text(encoding="utf-8"))


def check(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    (found,) = [own for own in report["checks"] if own["name"] == name]
    return found


def persian_questions(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Questions of the Persian medical pairs, read out of their prompts."""
    found = []
    for row in rows:
        prompt = said(row, "prompt")
        stem = re.search(r"## پرسش\n(.*?)\n+## گزینه", prompt, re.DOTALL)
        options = dict(re.findall(r"^\[([A-D])\] : (.*)$", prompt, re.MULTILINE))
        assert stem and len(options) == 4
        gold = row["reference_answer"]
        found.append({"id": row["id"], "question": stem[1].strip(), "options": options, "gold": gold})
    return found


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
