"""Two ranks train what one rank trains, fewer pairs than ranks included; a worker ends after its torchrun did.

Ranks are children that share a process group (gloo); one test goes through torchrun itself.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from run_fixtures import (
    HELD_OUT,
    OWN_PAIRS,
    ROOT,
    arguments,
    assert_stopped_in_one_line,
    contents,
    rows,
    run_child,
    run_here,
    run_ranks,
)

from trainer import dist
from trainer.run_folder import RunLock


def losses_of(folder: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in rows(folder)]


def test_two_ranks_give_the_curve_of_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """16 pairs in batches of 5: the last batch has one pair and leaves a rank without work, as does the evaluation."""
    settings = ("train.global_batch=5", f"data.eval={OWN_PAIRS}", "eval.max_pairs=1", "eval.every=2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_here(arguments(one, tiny_model_dir, *settings)) == 0
    assert run_ranks(arguments(two, tiny_model_dir, *settings), tmp_path) == [0, 0]
    assert len(losses_of(two)) == 4
    for found, wanted in zip(rows(two), rows(one), strict=True):
        # rewards are small differences of large numbers
        assert json.loads(found) == pytest.approx(json.loads(wanted), rel=1e-5, abs=1e-5)


def test_two_ranks_resume_what_two_ranks_began_and_one_rank_goes_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    settings = (*HELD_OUT, "checkpoint.every=2")
    assert run_ranks(arguments(whole, tiny_model_dir, *settings), tmp_path) == [0, 0]
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_4")
    shutil.rmtree(folder / "export")
    assert run_ranks(arguments(folder, tiny_model_dir, *settings), tmp_path) == [0, 0]
    assert rows(folder) == rows(whole)
    assert contents(folder / "export") == contents(whole / "export")
    shutil.rmtree(folder / "export")
    assert run_ranks(arguments(folder, tiny_model_dir, *settings), tmp_path) == [0, 0]  # only the export is left to do
    assert contents(folder / "export") == contents(whole / "export")
    shutil.rmtree(folder / "checkpoints" / "step_4")
    assert run_child(arguments(folder, tiny_model_dir, *settings), tmp_path / "out") == 0
    assert "note: world_size was 2, is 1: results agree up to rounding only" in (tmp_path / "out").read_text()
    assert losses_of(folder) == pytest.approx(losses_of(whole), rel=1e-5)


def test_fewer_pairs_than_ranks_at_the_very_first_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    argv = arguments(tmp_path / "run", tiny_model_dir, "train.global_batch=1", "train.max_steps=2")
    assert run_ranks(argv, tmp_path) == [0, 0]
    assert losses_of(tmp_path / "run")[0] == pytest.approx(0.693147, abs=1e-6)


def test_under_torchrun_and_without_it_once_it_died(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ("train.max_steps=100000", "train.epochs=100000", "checkpoint.every=100000")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*launch, "trainer/main.py", *arguments(folder, tiny_model_dir, *settings)]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < 3:
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    worker = int((folder / ".lock").read_text())
    assert worker != launcher.pid
    launcher.kill()
    launcher.wait()
    try:
        with RunLock(folder, wait_s=30, warn=lambda text: None):  # given back when the worker has ended
            assert_stopped_in_one_line(tmp_path / "log", f"{folder}: torchrun is gone; start the same command again")
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def test_a_worker_whose_torchrun_died_before_it_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens where torchrun's store was: said soon, not after dist.timeout_s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (names | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "REFUSED_S", 0.5)
    began = time.monotonic()
    with pytest.raises(torch.distributed.DistNetworkError, match="torchrun, which listened at .* is gone") as caught:
        dist.start(torch.device("cpu"), timeout_s=100)
    assert time.monotonic() - began < 50
    assert dist.lost_rank(caught.value) == "another rank has ended or cannot be reached"


@pytest.mark.long
def test_two_workers_of_torchrun(tiny_model_dir: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "trainer/main.py"]
    argv = arguments(tmp_path / "two", tiny_model_dir)
    done = subprocess.run([*command, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run_here(arguments(tmp_path / "one", tiny_model_dir)) == 0
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    # a fault of the user: the workers' line, torchrun's own report after it, its exit code
    bad = [*command, *arguments(tmp_path / "bad", tiny_model_dir, "data.train=none.jsonl")]
    done = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "error: none.jsonl: no such file" in done.stderr
    assert not (tmp_path / "bad").exists()


def test_a_run_without_torchrun_outlives_the_shell_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "LAUNCHER", -1)
    assert not dist.launcher_is_gone()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert dist.launcher_is_gone()
