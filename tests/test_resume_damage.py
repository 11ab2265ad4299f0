"""Runs whose folder was damaged, is in use or has no room left: what is said, and that nothing good is lost."""

import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from run_fixtures import (
    HELD_OUT,
    STEP_3_SAVED,
    Unbroken,
    arguments,
    assert_same,
    assert_stopped_in_one_line,
    contents,
    killed_run,
    rows,
    run_child,
    run_here,
    start_child,
    steps,
    unbroken_run,
)

from trainer import train
from trainer.run_folder import RunLock


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


# --- damage ----------------------------------------------------------------------------------------------------------


def cut_file(step: Path) -> None:
    path = step / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_manifest(step: Path) -> None:
    (step / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [cut_file, lose_manifest])
def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_taken(
    damage, partial_run: Path, tiny_model_dir: Path, unbroken: Unbroken, capsys: pytest.CaptureFixture[str]
) -> None:  # noqa: ANN001
    damage(partial_run / "checkpoints" / "step_2")
    assert run_here(arguments(partial_run, tiny_model_dir, *HELD_OUT)) == 0
    said = capsys.readouterr()
    assert f"passed over: {partial_run}/checkpoints/step_2" in said.err
    assert f"resuming from {partial_run}/checkpoints/step_1 at step 1 of 4" in said.out
    assert_same(partial_run, unbroken)


def test_the_checkpoint_a_run_went_back_from_is_not_kept_in_place_of_a_new_one(
    tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken, killed: Path
) -> None:
    """Step 4 is damaged and step 2 whole: after step 3 that one must stay, though step 4 has the higher number."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken.folder, folder)
    lose_manifest(folder / "checkpoints" / "step_4")
    shutil.rmtree(folder / "checkpoints" / "step_3")
    shutil.copytree(killed / "checkpoints" / "step_2", folder / "checkpoints" / "step_2")
    argv = arguments(folder, tiny_model_dir, *HELD_OUT, "checkpoint.keep_last=1")
    assert run_child(argv, tmp_path / "out", dies_at="shutil.rmtree checkpoints/step_4.tmp") == -signal.SIGKILL
    assert steps(folder) == ["step_3", "step_4"]  # with step 4 still the damaged one
    assert run_here(argv) == 0
    assert rows(folder) == unbroken.rows and steps(folder) == ["step_4"]


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def test_a_flipped_bit_is_named_and_the_older_checkpoint_taken(
    partial_run: Path, tiny_model_dir: Path, unbroken: Unbroken, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = partial_run / "checkpoints" / "step_2"
    flip_bit(newest / "optimizer.safetensors")
    assert run_here(arguments(partial_run, tiny_model_dir, *HELD_OUT)) == 0
    said = capsys.readouterr()
    warning = "optimizer.safetensors differs from its sha256 in the manifest; resume from another step"
    assert f"passed over: {newest}: {warning}\n" in said.err
    assert f"resuming from {partial_run}/checkpoints/step_1 at step 1 of 4" in said.out
    assert_same(partial_run, unbroken)


def test_no_whole_checkpoint_left_or_the_named_one_damaged(
    partial_run: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = partial_run / "checkpoints"
    for step in ("step_1", "step_2"):
        flip_bit(folder / step / "model.safetensors")
    before = contents(partial_run)
    assert run_here(arguments(partial_run, tiny_model_dir, *HELD_OUT)) == 2
    *passed_over, line = capsys.readouterr().err.splitlines()
    assert [text.partition(": model")[0] for text in passed_over] == [
        f"passed over: {folder}/step_2",
        f"passed over: {folder}/step_1",
    ]
    assert line.startswith(f"error: {folder}: none of its 2 checkpoints is whole; move them away to start over")
    assert run_here(arguments(partial_run, tiny_model_dir, *HELD_OUT, f"run.resume={folder}/step_2")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}/step_2: model.safetensors differs from its sha256 in the manifest")
    assert contents(partial_run) == before


# --- one writer ------------------------------------------------------------------------------------------------------


def test_a_second_start_waits_and_then_names_the_process(
    tiny_model_dir: Path,
    tmp_path: Path,
    unbroken: Unbroken,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *HELD_OUT)
    process = start_child(argv, tmp_path / "out")
    while not (folder / "metrics.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)  # type: ignore[arg-type]
    try:
        monkeypatch.setattr(train, "RunLock", partial(RunLock, wait_s=0.2))
        before = contents(folder)
        assert run_here(argv) == 2
        waiting, refused = capsys.readouterr().err.splitlines()
        assert waiting == f"{folder}: in use by process {process.pid}, waiting up to 0.2 s"
        assert refused.startswith(f"error: {folder}: in use by process {process.pid} (waited 0.2 s); stop it or choose")
        assert contents(folder) == before
    finally:
        os.kill(process.pid, signal.SIGCONT)  # type: ignore[arg-type]  # a stopped child could not be ended either
    process.join()
    assert process.exitcode == 0
    assert_same(folder, unbroken)


# --- a full disk -----------------------------------------------------------------------------------------------------


def test_a_disk_full_at_a_checkpoint(tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *HELD_OUT)
    assert run_child(argv, tmp_path / "out", limit_at=(STEP_3_SAVED, 100_000)) == 1
    words = ("checkpoints/step_3: the checkpoint cannot be written (File too large)", "earlier ones are whole")
    assert_stopped_in_one_line(tmp_path / "out", *words)
    assert steps(folder) == ["step_1", "step_2"]
    assert run_here(argv) == 0
    assert_same(folder, unbroken)


def test_a_disk_full_at_the_export(tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *HELD_OUT)
    assert run_child(argv, tmp_path / "out", limit_at=("shutil.rmtree export.tmp", 100_000)) == 1
    assert_stopped_in_one_line(tmp_path / "out", "export: the export cannot be written (File too large)")
    assert not (folder / "export").exists() and not (folder / "export.tmp").exists()
    assert run_here(argv) == 0
    assert_same(folder, unbroken)


def test_a_disk_full_at_a_row_of_metrics(tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *HELD_OUT, "checkpoint.asynchronous=false")
    size = (unbroken.folder / "metrics.jsonl").stat().st_size
    assert run_child(argv, tmp_path / "out", limit_at=("os.rename checkpoints/step_3.tmp", size - 300)) == 1
    assert_stopped_in_one_line(tmp_path / "out", "metrics.jsonl: step 4 cannot be written", "free space and start")
    assert run_here(argv) == 0
    assert_same(folder, unbroken)


def test_a_file_system_without_room(tiny_model_dir: Path, tmp_path: Path, unbroken: Unbroken) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        argv = arguments(mount / "run", tiny_model_dir, *HELD_OUT)
        assert run_child(argv, tmp_path / "out", dies_at=STEP_3_SAVED) == -9
        free = shutil.disk_usage(mount).free
        (mount / "ballast").write_bytes(bytes(free - 2_000_000))  # enough to start, too little for two more steps
        assert run_child([*argv, "--checkpoint.keep_last=9"], tmp_path / "out") == 1
        assert_stopped_in_one_line(
            tmp_path / "out", "step_4: the checkpoint cannot be written (No space left on device)"
        )
        assert run_child([*argv, "--checkpoint.keep_last=9"], tmp_path / "out") == 2
        assert "free; free some space" in (tmp_path / "out").read_text(encoding="utf-8")
        (mount / "ballast").unlink()
        assert run_child(argv, tmp_path / "out") == 0
        assert_same(mount / "run", unbroken)
    finally:
        subprocess.run(["umount", str(mount)], check=True)
