"""What startup refuses because of what data and loss are together."""

import json
from pathlib import Path

import pytest

from trainer.entry import exit_code
from trainer.train import main

PAIRS = Path(__file__).parent / "golden" / "own_16.jsonl"


@pytest.mark.parametrize(("loss", "refused"), [("aot", True), ("sigmoid", False)])
def test_sorted_losses_take_no_row_weights(
    loss: str, refused: bool, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:2]]
    data, config = tmp_path / "pairs.jsonl", tmp_path / "config.toml"
    data.write_text("".join(json.dumps({**row, "weight": 0.5}) + "\n" for row in rows), encoding="utf-8")
    config.write_text("", encoding="utf-8")
    settings = [f"model.path={tiny_model_dir}", f"data.train={data}", f"loss.loss_type={loss}", "train.max_steps=1"]
    settings += [f"run.dir={tmp_path / 'run'}", "train.dtype=float32"]
    code = exit_code(main, [str(config), *(f"--{setting}" for setting in settings)])
    error = capsys.readouterr().err
    assert code == (2 if refused else 0), error
    assert ("cannot weigh them" in error) is refused
    assert (tmp_path / "run").exists() is not refused


def test_sorted_losses_say_how_many_pairs_they_sort(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "config.toml"
    config.write_text("", encoding="utf-8")
    settings = [f"model.path={tiny_model_dir}", f"data.train={PAIRS}", "loss.loss_type=aot", "train.max_steps=1"]
    settings += [f"run.dir={tmp_path / 'run'}", "train.dtype=float32", "train.global_batch=5"]
    assert exit_code(main, [str(config), *(f"--{setting}" for setting in settings)]) == 0
    assert "aot sorts over the pairs of a micro-batch: 5 on this rank" in capsys.readouterr().out
