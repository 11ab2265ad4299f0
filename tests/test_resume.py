"""A run killed and started again is the run that was never killed: metrics, checkpoints and export, bit for bit.

The children die by SIGKILL before a chosen operation on their run folder, so every instant between two operations can
be named; one test kills a real command by the clock.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_fixtures import (
    HELD_OUT,
    OWN_PAIRS,
    ROOT,
    STEP_3_SAVED,
    Unbroken,
    arguments,
    assert_same,
    contents,
    killed_run,
    rows,
    run_child,
    run_here,
    steps,
    unbroken_run,
)


@pytest.fixture(scope="module")
def unbroken(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return unbroken_run(tmp_path_factory.mktemp("unbroken"), tiny_model_dir)


@pytest.fixture(scope="module")
def killed(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, unbroken: Unbroken) -> Path:
    return killed_run(tmp_path_factory.mktemp("killed"), tiny_model_dir)


@pytest.fixture
def partial_run(tmp_path: Path, killed: Path) -> Path:
    """A copy of the killed run that a test may change."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


# --- killed ----------------------------------------------------------------------------------------------------------

INSTANTS = {
    "before anything": "os.mkdir checkpoints",
    "before the first row": "open metrics.jsonl",
    "between the first row and its checkpoint": "shutil.rmtree checkpoints/step_1.tmp",
    "between a later row and its checkpoint": "shutil.rmtree checkpoints/step_3.tmp",
    "between the files of a checkpoint": "open checkpoints/step_2.tmp/optimizer.safetensors",
    "before the manifest": "open checkpoints/step_3.tmp/manifest.json",
    "before a checkpoint gets its name": "os.rename checkpoints/step_3.tmp",
    "before an old checkpoint goes": "os.rename checkpoints/step_2",
    "in the midst of the export": "open export.tmp/model.safetensors",
    "before the export gets its name": "os.rename export.tmp",
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_and_started_again(instant: str, tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    argv = arguments(tmp_path / "run", tiny_model_dir, *HELD_OUT)
    assert run_child(argv, tmp_path / "out", dies_at=INSTANTS[instant]) == -signal.SIGKILL
    assert run_here(argv) == 0
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.long
def test_killed_at_every_instant(tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    for number in range(1, len(unbroken.operations) + 1):
        folder = tmp_path / f"run_{number}"
        argv = arguments(folder, tiny_model_dir, *HELD_OUT)
        assert run_child(argv, tmp_path / "out", dies_at=number) == -signal.SIGKILL
        assert run_child(argv, tmp_path / "out") == 0, unbroken.operations[number - 1]
        assert_same(folder, unbroken)


def test_killed_again_and_again(tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    argv = arguments(tmp_path / "run", tiny_model_dir, *HELD_OUT)
    codes = [run_child(argv, tmp_path / "out", dies_at=31)]
    while codes[-1] != 0:
        codes.append(run_child(argv, tmp_path / "out", dies_at=31))
        assert len(codes) < 10
    assert codes.count(-signal.SIGKILL) >= 3
    assert_same(tmp_path / "run", unbroken)


@pytest.mark.parametrize("dtype", ["bf16", "pure_bf16"])
def test_killed_in_bf16(dtype: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """What the model computes with is not what the optimizer keeps: both have to come back."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_here(arguments(whole, tiny_model_dir, f"train.dtype={dtype}")) == 0
    argv = arguments(killed, tiny_model_dir, f"train.dtype={dtype}")
    assert run_child(argv, tmp_path / "out", dies_at=STEP_3_SAVED) == -signal.SIGKILL
    assert run_here(argv) == 0
    assert rows(killed) == rows(whole)
    assert contents(killed / "export") == contents(whole / "export")


def test_what_a_kill_left_half_written_goes_even_if_no_later_save_replaces_it(
    tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *HELD_OUT)
    manifest = "open checkpoints/step_3.tmp/manifest.json"
    assert run_child(argv, tmp_path / "out", dies_at=manifest) == -signal.SIGKILL
    assert steps(folder) == ["step_1", "step_2", "step_3.tmp"]
    assert run_here([*argv, "--checkpoint.every=4"]) == 0
    assert steps(folder) == ["step_2", "step_4"] and rows(folder) == unbroken.rows


def test_a_real_command_killed_by_the_clock(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = ("train.max_steps=25", "checkpoint.every=4", "train.epochs=9")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    argv = arguments(killed, tiny_model_dir, *settings)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "trainer/main.py", *argv], cwd=ROOT, stdout=log, stderr=log)
    metrics = killed / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 6 <= len(rows(killed)) < 25
    assert run_child(argv, tmp_path / "out") == 0
    assert "resuming from" in (tmp_path / "out").read_text()
    assert run_here(arguments(whole, tiny_model_dir, *settings)) == 0
    assert rows(killed) == rows(whole)
    assert contents(killed / "export") == contents(whole / "export")


def test_a_torn_last_row_is_cut(partial_run: Path, tiny_model_dir: Path, unbroken: Unbroken) -> None:
    with open(partial_run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "loss": 0.6')
    assert run_here(arguments(partial_run, tiny_model_dir, *HELD_OUT)) == 0
    assert_same(partial_run, unbroken)


# --- finished --------------------------------------------------------------------------------------------------------


def test_the_same_command_again_says_finished(
    tiny_model_dir: Path, unbroken: Unbroken, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(unbroken.folder)
    assert run_here(arguments(unbroken.folder, tiny_model_dir, *HELD_OUT)) == 0
    assert f"finished: step 4 of 4, all of it in {unbroken.folder}" in capsys.readouterr().out
    assert contents(unbroken.folder) == before


def test_an_export_that_is_missing_is_made_from_the_checkpoint(
    tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    shutil.rmtree(folder / "export")
    assert run_here(arguments(folder, tiny_model_dir, *HELD_OUT)) == 0
    assert_same(folder, unbroken)


# --- changed between -------------------------------------------------------------------------------------------------

REFUSED = (
    "train.learning_rate=2e-3", "train.global_batch=8", "train.seed=7", "train.max_steps=5", "train.dtype=bf16",
    "train.schedule=cosine", "train.max_grad_norm=0.5", "train.weight_decay=0.1", "loss.beta=0.2",
    "loss.loss_type=ipo", "data.max_length=300", "kernels.matmul=medium",
)  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_a_change_of_the_training_is_refused_by_name(
    change: str, partial_run: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(partial_run)
    assert run_here(arguments(partial_run, tiny_model_dir, *HELD_OUT, change)) == 2
    key = change.partition("=")[0]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {partial_run}/checkpoints/step_2: {key}: was ") and "set another run.dir" in line
    assert contents(partial_run) == before


def test_what_leaves_the_training_alone_may_change(
    partial_run: Path, tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    changes = (
        "checkpoint.keep_last=5", "run.progress=false", "run.log_every=1", "reference.mode=model",
        f"reference.cache_dir={tmp_path / 'cache'}", f"data.cache_dir={tmp_path / 'shards'}", "data.lint=true",
    )  # fmt: skip
    assert run_here(arguments(partial_run, tiny_model_dir, *HELD_OUT, *changes)) == 0
    # a frozen model in place of the cache runs the same arithmetic on the same micro-batches only in training
    for found, wanted in zip(rows(partial_run), unbroken.rows, strict=True):
        assert json.loads(found) == pytest.approx(json.loads(wanted), rel=1e-4, abs=1e-5)
    assert steps(partial_run) == ["step_1", "step_2", "step_3", "step_4"]


def test_model_and_data_may_move(partial_run: Path, tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "moved_model")
    data = shutil.copy(OWN_PAIRS, tmp_path / "moved.jsonl")
    assert run_here(arguments(partial_run, tmp_path / "moved_model", *HELD_OUT, data=Path(data))) == 0
    assert_same(partial_run, unbroken)


def test_other_micro_batches_give_the_same_training_up_to_rounding(
    partial_run: Path, tiny_model_dir: Path, unbroken: Unbroken
) -> None:
    assert run_here(arguments(partial_run, tiny_model_dir, *HELD_OUT, "train.tokens_per_microbatch=250")) == 0
    for found, wanted in zip(rows(partial_run), unbroken.rows, strict=True):
        assert json.loads(found) == pytest.approx(json.loads(wanted), rel=1e-4, abs=1e-5)


def test_changed_data_is_refused(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "pairs.jsonl"
    shutil.copy(OWN_PAIRS, data)
    argv = arguments(tmp_path / "run", tiny_model_dir, "train.max_steps=1", data=data)
    assert run_here(argv) == 0
    before = contents(tmp_path / "run")
    data.write_text(data.read_text(encoding="utf-8").replace("The answer is 33", "The answer is 32"), encoding="utf-8")
    capsys.readouterr()
    assert run_here(argv) == 2
    assert "the training data changed since this run began" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("changed", ["model.path", "reference.path"])
def test_changed_weights_are_refused(
    changed: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, reference = tmp_path / "policy", tmp_path / "reference"
    for folder in (policy, reference):
        shutil.copytree(tiny_model_dir, folder)
    argv = arguments(tmp_path / "run", policy, "train.max_steps=1", f"reference.path={reference}")
    assert run_here(argv) == 0
    before = contents(tmp_path / "run")
    weights = (policy if changed == "model.path" else reference) / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1
    weights.write_bytes(bytes(raw))
    capsys.readouterr()
    assert run_here(argv) == 2
    assert f"the weights in {changed} changed since this run began" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


# --- run.resume ------------------------------------------------------------------------------------------------------


def test_never_refuses_a_used_folder(
    tiny_model_dir: Path, unbroken: Unbroken, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(unbroken.folder)
    assert run_here(arguments(unbroken.folder, tiny_model_dir, *HELD_OUT, "run.resume=never")) == 2
    assert f"error: {unbroken.folder}: holds checkpoints and run.resume is never" in capsys.readouterr().err
    assert contents(unbroken.folder) == before


def test_a_named_checkpoint_is_gone_on_from_in_another_folder(
    partial_run: Path, tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken
) -> None:
    source = partial_run / "checkpoints" / "step_2"
    before = contents(partial_run)
    argv = arguments(tmp_path / "other", tiny_model_dir, *HELD_OUT, f"run.resume={source}")
    assert run_here(argv) == 0
    assert rows(tmp_path / "other") == unbroken.rows[2:]
    assert contents(tmp_path / "other" / "export") == unbroken.export
    assert contents(partial_run) == before
