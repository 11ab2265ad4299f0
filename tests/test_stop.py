"""A run that is asked to stop: it saves, says how to go on and exits with 0, and goes on as if nothing had been."""

import os
import shlex
import signal
import time
from pathlib import Path

import pytest
from run_fixtures import HELD_OUT, arguments, contents, rows, run_child, run_here, start_child, steps

from trainer import dist, loop
from trainer.stop import StopRequest, resume_command

SETTINGS = (*HELD_OUT, "checkpoint.every=3", "train.max_steps=6", "train.epochs=9")


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_here(arguments(folder, tiny_model_dir, *SETTINGS)) == 0
    return folder


def signal_at(monkeypatch: pytest.MonkeyPatch, number: int, *calls: int) -> None:
    """This process gets the signal before the micro-batches of these numbers, from 1."""
    count, micro_batch = 0, loop._micro_batch

    def with_signal(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count in calls:
            signal.raise_signal(number)
        return micro_batch(*arguments, **options)

    monkeypatch.setattr(loop, "_micro_batch", with_signal)


def micro_batches_of_a_step(tiny_model_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    seen: list[int] = []
    micro_batch = loop._micro_batch
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_micro_batch", lambda *args, **options: seen.append(1) or micro_batch(*args, **options))
        assert run_here(arguments(folder, tiny_model_dir, *SETTINGS, "train.max_steps=1", "run.export=false")) == 0
    return len(seen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_signal_ends_the_run_after_its_step(
    number: signal.Signals,
    asynchronous: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *SETTINGS, f"checkpoint.asynchronous={asynchronous}")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "LONG_STEP_S", 1e9)
        signal_at(patch, number, 3)
        assert run_here(argv) == 0
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    said = capsys.readouterr().out.splitlines()
    done = len(rows(folder))
    assert 1 <= done < 6 and rows(folder) == rows(whole)[:done]
    assert said[-2:] == [
        f"{folder}: stopped after step {done} of 6 ({number.name})",
        f"resume with: {shlex.join(['python', 'trainer/main.py', *argv])}",
    ]
    assert f"step_{done}" in steps(folder) and not (folder / "export").exists()
    assert run_here(argv) == 0
    assert rows(folder) == rows(whole) and contents(folder / "export") == contents(whole / "export")


def test_a_long_step_is_thrown_away_half_done(
    tiny_model_dir: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = micro_batches_of_a_step(tiny_model_dir, tmp_path / "one", monkeypatch)
    assert each > 1
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *SETTINGS)
    updates: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "LONG_STEP_S", 0.0)  # every step is a long one
        step = loop.AdamW.step
        patch.setattr(loop.AdamW, "step", lambda self: updates.append(1) or step(self))
        signal_at(patch, signal.SIGTERM, each + 1)  # the first micro-batch of step 2
        assert run_here(argv) == 0
    assert len(updates) == 1 and rows(folder) == rows(whole)[:1] and steps(folder) == ["step_1"]
    assert run_here(argv) == 0
    assert rows(folder) == rows(whole) and contents(folder / "export") == contents(whole / "export")


def test_a_run_stopped_before_its_first_step_leaves_nothing_and_starts_again(
    tiny_model_dir: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *SETTINGS)
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, 1)  # the duration of a first step is unknown: looked at between micro-batches
        assert run_here(argv) == 0
    assert steps(folder) == [] and not (folder / "metrics.jsonl").exists()
    assert run_here(argv) == 0
    assert rows(folder) == rows(whole)


def test_a_second_interrupt_ends_the_run_at_once(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    each = micro_batches_of_a_step(tiny_model_dir, tmp_path / "one", monkeypatch)
    argv = arguments(tmp_path / "run", tiny_model_dir, *SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "LONG_STEP_S", 1e9)
        signal_at(patch, signal.SIGINT, each + 1, each + 2)  # both in step 2
        assert run_here(argv) == 1
    assert capsys.readouterr().err.splitlines()[-1] == ("stopped: interrupted; start the same command again to resume")
    assert run_here(argv) == 0


def test_a_real_process_gets_sigterm(tiny_model_dir: Path, tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    settings = (*HELD_OUT, "checkpoint.every=3", "train.max_steps=2000", "train.epochs=900")
    process = start_child(arguments(folder, tiny_model_dir, *settings), tmp_path / "out")
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < 4:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)  # type: ignore[arg-type]
    process.join(timeout=60)
    assert process.exitcode == 0
    done = len(rows(folder))
    text = (tmp_path / "out").read_text(encoding="utf-8")
    assert f"SIGTERM: saving, then stopping\n{folder}: stopped after step {done} of 2000 (SIGTERM)\nresume with" in text
    assert f"step_{done}" in steps(folder) and not any(name.endswith(".tmp") for name in steps(folder))


def test_a_save_that_fails_in_the_background_stops_the_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Long before the next save would be due."""
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, "checkpoint.every=2", "train.max_steps=400", "train.epochs=900")
    limit = ("shutil.rmtree checkpoints/step_4.tmp", 100_000)
    assert run_child(argv, tmp_path / "out", limit_at=limit) == 1
    (line,) = (line for line in (tmp_path / "out").read_text().splitlines() if line.startswith("stopped: "))
    assert "checkpoints/step_4: the checkpoint cannot be written (File too large); earlier ones are whole" in line
    assert steps(folder) == ["step_2"] and 4 <= len(rows(folder)) < 10


def test_a_torchrun_that_died_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    request = StopRequest()
    assert not request.asked()
    monkeypatch.setattr(dist, "launcher_is_gone", lambda: True)
    assert request.asked() and request.reason == "torchrun is gone"
    request.ask("another reason")
    assert request.reason == "torchrun is gone"


def test_the_command_that_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["my config.toml", "--run.dir=x"]
    for name in ("TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert resume_command(argv) == "python trainer/main.py 'my config.toml' --run.dir=x"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert resume_command(argv) == "torchrun --nproc-per-node=8 trainer/main.py 'my config.toml' --run.dir=x"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "4")
    assert resume_command(argv).endswith("--run.dir=x (on each of 4 nodes)")
