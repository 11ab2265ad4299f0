"""The picture of a run: a PNG from real rows, a line for what cannot be drawn."""

import json
from pathlib import Path

import pytest

from trainer import report
from trainer.entry import exit_code

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plots)")


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_draws_what_the_rows_have(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"step": s, "loss": 1 / s, "rewards/margins": s, "eval_loss": None} for s in (1, 2, 3)])
    png = tmp_path / "run.png"
    assert exit_code(report.main, ["--run", str(tmp_path), "--png", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", [[], [{"step": 1}]])
def test_nothing_to_draw_is_one_line(rows: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_rows(tmp_path, rows)
    assert exit_code(report.main, ["--run", str(tmp_path), "--png", str(tmp_path / "run.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run.png").exists()
