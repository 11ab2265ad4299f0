"""Which device a run takes, what it refuses, and what changes with the device: the kernels, the reference cache.

Runs on a GPU are tests/test_gpu.py's.
"""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from run_fixtures import arguments, rows, run_here

from trainer import dist
from trainer.config_sections import KernelsConfig, section_hints
from trainer.errors import ConfigError
from trainer.models.attention_form import FORMS
from trainer.optim import AdamW


def with_gpus(patch: pytest.MonkeyPatch, number: int) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: number > 0)
    patch.setattr(torch.cuda, "device_count", lambda: number)


@pytest.mark.parametrize(
    ("name", "gpus", "local_rank", "chosen"),
    [
        ("auto", 0, None, "cpu"),
        ("auto", 1, None, "cuda:0"),
        ("auto", 8, "5", "cuda:5"),
        ("cuda", 2, "1", "cuda:1"),
        ("cpu", 2, "1", "cpu"),
        ("cpu", 0, "7", "cpu"),
    ],
)
def test_a_rank_takes_the_gpu_of_its_number(
    name: str, gpus: int, local_rank: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert dist.choose_device(name) == torch.device(chosen)


@pytest.mark.parametrize(
    ("name", "gpus", "problem"),
    [
        ("cuda", 0, "run.device = cuda: PyTorch finds no GPU here; use auto or cpu"),
        (
            "auto",
            2,
            "run.device = auto: local rank 2 has no GPU, PyTorch finds 2; start 2 ranks on this machine or use",
        ),
    ],
)
def test_a_gpu_that_is_not_there(name: str, gpus: int, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, gpus)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=problem):
        dist.choose_device(name)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("run.device=cuda", "error: run.device = cuda: PyTorch finds no GPU here"),
        (
            "kernels.attention=flex",
            "error: kernels.attention = flex: PyTorch cannot train with flex attention on a CPU",
        ),
    ],
)
def test_a_run_that_needs_a_gpu_is_refused_in_one_line(
    setting: str,
    words: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_gpus(monkeypatch, 0)
    assert run_here(arguments(tmp_path / "run", tiny_model_dir, setting)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith(words)] == lines


def test_merge_attention_trains_what_blocks_train_with_a_reference_of_its_own(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    settings = ("run.device=cpu", f"reference.cache_dir={cache}", "train.activation_checkpointing=full")
    for form in ("blocks", "merge"):
        assert run_here(arguments(tmp_path / form, tiny_model_dir, *settings, f"kernels.attention={form}")) == 0
    assert len(list(cache.glob("*.safetensors"))) == 2
    for found, wanted in zip(rows(tmp_path / "merge"), rows(tmp_path / "blocks"), strict=True):
        # rewards are small differences of large numbers
        assert json.loads(found) == pytest.approx(json.loads(wanted), rel=1e-5, abs=1e-5)
    assert rows(tmp_path / "merge") != rows(tmp_path / "blocks")


def test_a_run_goes_on_on_the_other_kind_of_device(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As if steps 1 and 2 had been done on a GPU with its kernels, which do not run here."""
    folder = tmp_path / "run"
    assert run_here(arguments(folder, tiny_model_dir, "run.device=cpu")) == 0
    whole = rows(folder)
    path = folder / "checkpoints" / "step_3" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert manifest["device"] == "cpu"
    del manifest["digest"]  # its own, which the change would break
    manifest |= {"device": "cuda", "choices": {**manifest["choices"], "impl": "triton"}}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    argv = arguments(folder, tiny_model_dir, "run.device=cpu", f"run.resume={path.parent}")
    assert run_here(argv) == 0
    assert "note: device was cuda, is cpu: results agree up to rounding only" in capsys.readouterr().out
    assert rows(folder) == whole


def test_optimizer_state_lies_where_the_parameter_does() -> None:
    """All of it, the count of steps included, as PyTorch's fused AdamW asks for on a GPU."""
    parameter = torch.zeros(3, device="meta", requires_grad=True)
    parameter.grad = torch.zeros(3, device="meta")
    optimizer = AdamW([parameter], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    optimizer.step()
    assert {name: value.device.type for name, value in optimizer.state[parameter].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


def test_the_configuration_knows_every_form_of_attention() -> None:
    assert get_args(section_hints(KernelsConfig)["attention"]) == FORMS
