"""The run folder: one writer, leftovers of a killed run, the newest whole checkpoint, messages about the disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.checkpoint import Manifest, read_manifest
from trainer.errors import CheckpointError, RunError
from trainer.run_folder import (
    RunLock,
    ensure_file_writable,
    ensure_writable,
    find_checkpoints,
    remove_leftovers,
    require_free_space,
    write_file,
)

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys, time
from trainer.run_folder import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start_holder(run_dir: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(run_dir), str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def write_step(run_dir: Path, step: int) -> Path:
    folder = run_dir / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345678")
    manifest = Manifest(step=step, config="", data_digest="d", weights_digest="w", world_size=1, threads=1)
    files = {"model.safetensors": {"bytes": 8, "sha256": "unused here"}}
    (folder / "manifest.json").write_text(json.dumps({**vars(manifest), "files": files}), encoding="utf-8")
    return folder


# --- the lock --------------------------------------------------------------------------------------------------------


def test_second_start_waits_then_names_the_process_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    holder = start_holder(tmp_path, 60)
    said: list[str] = []
    begin = time.monotonic()
    with pytest.raises(RunError, match=rf"in use by process {holder.pid} \(waited 0.3 s\)") as caught:
        RunLock(tmp_path, wait_s=0.3, warn=said.append).acquire()
    assert 0.3 <= time.monotonic() - begin < 5
    assert said == [f"{tmp_path}: in use by process {holder.pid}, waiting up to 0.3 s"]
    assert "\n" not in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunLock(tmp_path, wait_s=0):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_released_lock_can_be_taken_and_a_waiting_start_gets_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    lock = RunLock(run_dir)
    lock.acquire()
    lock.release()
    lock.release()
    assert (run_dir / ".lock").read_bytes() == b""
    holder = start_holder(run_dir, 0.5)
    with RunLock(run_dir, wait_s=20, warn=lambda text: None):
        assert holder.wait(timeout=20) == 0


def test_a_forked_child_that_outlives_the_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    program = HOLDER.replace("time.sleep(float(sys.argv[2]))", "import os\n    if os.fork() == 0: time.sleep(2)")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    RunLock(tmp_path, wait_s=0).acquire()


# --- leftovers -------------------------------------------------------------------------------------------------------


def test_half_written_folders_go_and_half_replaced_ones_come_back(tmp_path: Path) -> None:
    whole = write_step(tmp_path, 5)
    write_step(tmp_path, 10).rename(tmp_path / "checkpoints" / "step_10.tmp")
    write_step(tmp_path, 7).rename(tmp_path / "checkpoints" / "step_7.old")
    (tmp_path / "checkpoints" / "step_5.old").mkdir()
    (tmp_path / "checkpoints" / "notes.tmp").mkdir()
    (tmp_path / "export").mkdir()
    (tmp_path / "export.tmp").mkdir()
    changed = remove_leftovers(tmp_path)
    assert {path.name for path in changed} == {"step_10.tmp", "step_7.old", "step_5.old", "export.tmp"}
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["notes.tmp", "step_5", "step_7"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "export"]
    assert read_manifest(whole).step == 5
    assert remove_leftovers(tmp_path) == []


# --- the newest checkpoint -------------------------------------------------------------------------------------------


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path) == []
    (tmp_path / "checkpoints" / "step_3.tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / "other").mkdir()
    assert find_checkpoints(tmp_path) == []


def test_newest_first_is_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        write_step(tmp_path, step)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_10", "step_9", "step_2"]


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_manifest_cut(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-5])


def damage_file_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damage_file_short(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"1234567")


@pytest.mark.parametrize("damage", [damage_no_manifest, damage_manifest_cut, damage_file_missing, damage_file_short])
def test_a_damaged_checkpoint_is_named_and_the_next_taken(tmp_path: Path, damage) -> None:  # noqa: ANN001
    older, newer = write_step(tmp_path, 5), write_step(tmp_path, 10)
    damage(newer)
    said: list[str] = []
    assert find_checkpoints(tmp_path, warn=said.append) == [older]
    assert len(said) == 1 and said[0].startswith(f"passed over: {newer}")
    damage(older)
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole") as caught:
        find_checkpoints(tmp_path, warn=said.append)
    assert "\n" not in str(caught.value)


# --- the disk --------------------------------------------------------------------------------------------------------


def test_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    ensure_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_way_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="a file stands where a folder should be"):
        ensure_writable(tmp_path / "runs" / below)
    assert (tmp_path / "runs").read_text() == "a file"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, which nobody can write to")
def test_a_read_only_folder_is_named() -> None:
    for folder in ("/proc/self", "/proc/self/run"):
        with pytest.raises(RunError, match=rf"{folder}: cannot be written to \("):
            ensure_writable(folder)


def test_a_pipe_is_written_to_and_a_link_stays_one(tmp_path: Path) -> None:
    """A rename would put a plain file in the place of either; of /dev/null, for a user who may do that."""
    pipe, link, real = tmp_path / "pipe", tmp_path / "link", tmp_path / "elsewhere" / "real"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    real.parent.mkdir()
    real.write_text("old")
    link.symlink_to(real)
    for path in (pipe, link):
        ensure_file_writable(path)
        write_file(path, "new\n")
    assert pipe.is_fifo() and os.read(reader, 100) == b"new\n"
    os.close(reader)
    assert link.is_symlink() and real.read_text() == "new\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "link", "pipe", "real"]


def test_free_space_is_compared_with_the_need(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(RunError, match=r"needs 1048576.0 GiB, the disk has [\d.]+ GiB free; free some space"):
        require_free_space(tmp_path / "not" / "there" / "yet", 2**50)
