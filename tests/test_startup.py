"""What startup refuses because of what data and loss are together."""

import json
import shutil
from pathlib import Path

import pytest

from trainer.config import load_config
from trainer.entry import exit_code
from trainer.errors import ModelError
from trainer.startup import open_data
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


@pytest.mark.parametrize(("original", "refused"), [(16, True), (4096, False)])
def test_rows_too_long_for_rope_that_depends_on_length_are_found_with_the_data(
    original: int, refused: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model, config = Path(shutil.copytree(tiny_model_dir, tmp_path / "model")), tmp_path / "config.toml"
    raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    raw |= {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": original}
    (model / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    config.write_text("", encoding="utf-8")
    settings = load_config([str(config), f"--model.path={model}", f"--data.train={PAIRS}"])
    if not refused:
        assert len(open_data(settings)[0]) == 16
        return
    with pytest.raises(ModelError, match="depends on a sequence's length beyond 16 tokens.*set data.max_length = 16"):
        open_data(settings)
