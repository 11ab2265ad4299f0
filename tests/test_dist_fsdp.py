"""Sharded runs (FSDP2) against one rank: the same curve whatever shares the work, and whatever resumes it.

Ranks are children that share a process group (gloo). The bound is that of rounding in float32.
"""

import json
import shutil
from pathlib import Path

import pytest
from run_fixtures import HELD_OUT, arguments, rows, run_here, run_ranks

STEPS = 10
MANY_MICROBATCHES = ("train.global_batch=5", f"train.max_steps={STEPS}", "train.tokens_per_microbatch=150", *HELD_OUT)
"""16 pairs in batches of 5: ragged micro-batches, and ranks without a pair in the last batch of an epoch."""
CLOSE = {"rel": 2e-5, "abs": 1e-6}


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank, a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert run_here(arguments(folder, tiny_model_dir, *MANY_MICROBATCHES, "checkpoint.keep_last=99")) == 0
    return folder


def assert_same_curve(found: Path, wanted: Path) -> None:
    """Losses and gradient norms; rewards are small differences of large numbers."""
    assert len(rows(found)) == len(rows(wanted)) == STEPS
    for ours, theirs in zip(map(json.loads, rows(found)), map(json.loads, rows(wanted)), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "grad_norm", "logps/chosen", "eval_loss"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], **CLOSE), (ours["step"], name)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, ("dist.grad_sync=last", "train.activation_checkpointing=full", "dist.cpu_offload=true")),
        (4, ()),
        (4, ("dist.replicas=2", "reference.mode=model")),
        (3, ("dist.strategy=replicas",)),
    ],
    ids=lambda value: "_".join(value) or "fsdp" if isinstance(value, tuple) else str(value),
)
def test_the_curve_is_that_of_one_rank(
    ranks: int, settings: tuple[str, ...], alone: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *MANY_MICROBATCHES, *settings)
    assert run_ranks(argv, tmp_path, ranks) == [0] * ranks
    assert_same_curve(folder, alone)
    assert (folder / "export" / "model.safetensors").stat().st_size == (
        alone / "export" / "model.safetensors"
    ).stat().st_size


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (4, 2)])
def test_another_number_of_ranks_goes_on(
    before: int, after: int, alone: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *MANY_MICROBATCHES, "checkpoint.keep_last=99")
    if before == 1:
        shutil.copytree(alone, folder)
    else:
        assert run_ranks(argv, tmp_path, before) == [0] * before
    for step in range(5, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    shutil.rmtree(folder / "export")
    assert (run_ranks(argv, tmp_path, after) == [0] * after) if after > 1 else run_here(argv) == 0
    assert_same_curve(folder, alone)
    assert (folder / "export").is_dir()


def test_ranks_that_replicas_do_not_divide_are_refused(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run_here(arguments(tmp_path / "run", tiny_model_dir, "dist.replicas=2")) == 2
    assert capsys.readouterr().err == "error: dist.replicas = 2: must divide the number of ranks, 3\n"
    assert not (tmp_path / "run").exists()
