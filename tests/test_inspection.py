"""`python -m trainer.models inspect`: what it says of whole folders, and what it finds in damaged ones."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_fixtures import VARIANTS
from run_fixtures import ROOT
from safetensors.torch import load_file, save_file

from trainer.errors import ModelError
from trainer.models.inspection import count, inspect_model

NORM = "model.norm.weight"


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_folder(folder: Path) -> None:
    found = inspect_model(folder, read_weights=True)
    lines = {line[:16].strip(): line[16:] for line in found.lines}
    weights = load_file(folder / "model.safetensors")
    assert lines["family"].startswith("llama (")
    assert f"({sum(tensor.numel() for tensor in weights.values())})" in lines["parameters"]
    assert lines["chat template"].startswith("from ")
    assert found.odd == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: change_config(folder, new_trick=1), "keys that nothing here reads: new_trick"),
        (lambda folder: change_config(folder, vocab_size=7), "tokens more than the model has rows"),
        (lambda folder: change_config(folder, vocab_size=7), "has shape"),
        (lambda folder: change_config(folder, num_hidden_layers=9), "tensors are missing, the first is model.layers."),
        (lambda folder: change_config(folder, eos_token_id=0), "a trained end may not stop generation"),
        (lambda folder: change_weights(folder, lambda w: w.update(extra=torch.ones(2))), "the first is extra"),
        (
            lambda folder: change_weights(folder, lambda w: w[NORM].fill_(float("nan"))),
            "numbers that are not finite, the first is model.norm.weight",
        ),
        (
            lambda folder: change_weights(folder, lambda w: w.update({NORM: w[NORM].half()})),
            "weights of several dtypes",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "only safetensors weights are read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "is not a whole safetensors file"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "tokenizer: "),
    ],
)  # fmt: skip
def test_what_is_odd_is_named(damage: Callable[[Path], object], problem: str, folder: Path) -> None:
    damage(folder)
    odd = inspect_model(folder, read_weights=True).odd
    assert any(problem in line for line in odd), odd


@pytest.mark.parametrize("name", ["gemma3", "phi", "smollm3 window", "cohere2", "phi3 longrope"])
def test_other_families(name: str, tmp_path: Path) -> None:
    model = VARIANTS[name].model()
    model.save_pretrained(tmp_path)
    found = inspect_model(tmp_path)
    numbers = sum({parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}.values())
    assert any(f"({numbers})" in line for line in found.lines)
    assert [line.split(":")[0] for line in found.odd] == ["tokenizer"]  # these folders have none


def test_the_command(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.models", "inspect"]
    change_config(folder, new_trick=1)
    done = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "suspicious: config.json has keys that nothing here reads: new_trick"
    refused = subprocess.run([*command, str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {tmp_path / 'none'}: no such folder") and refused.stderr.count("\n") == 1


def test_a_config_that_cannot_be_used(folder: Path) -> None:
    change_config(folder, model_type="mamba", state_size=3)
    with pytest.raises(ModelError, match="Keys that Llama does not have: state_size"):
        inspect_model(folder)


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (1000, "1.0 K"), (134_515_008, "134.5 M"), (8_030_000_000, "8.0 B")]
)
def test_counts_are_short(number: int, text: str) -> None:
    assert count(number) == text
