"""Tasks, rows and runs for tests of the evaluation. Not a test itself."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from run_fixtures import torch_settings_kept

from data_tools.samples import Sample, digest_of, row_of
from eval import main
from trainer.entry import exit_code


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a JSON Lines file by id."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def head(path: Path, out: Path, count: int) -> Path:
    """The first rows of a file as a file of their own."""
    out.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:count]) + "\n", encoding="utf-8")
    return out


def write_samples(path: Path, texts: Mapping[str, Sequence[str]], prompts: Mapping[str, Any] | None = None) -> Path:
    """A file of samples with these texts, as if drawn elsewhere; 10 tokens each. prompts: whose digests they bear."""
    rows = [
        Sample(
            id=name,
            sample=number,
            text=text,
            finish_reason="stop",
            model="elsewhere",
            settings_digest="s",
            prompt_digest="p" if prompts is None else digest_of(prompts[name]),
            completion_tokens=10,
        )
        for name, own in texts.items()
        for number, text in enumerate(own)
    ]
    path.write_bytes(b"".join(map(row_of, rows)))
    return path


def evaluate(*argv: object) -> int:
    """`python -m eval.main ...` in this process; the exit code."""
    with torch_settings_kept():
        return exit_code(main.main, [str(item) for item in argv])


def run(task: object, data: Path, out: Path, *more: object) -> int:
    return evaluate("run", "--task", task, "--data", data, "--out", out, *more)
