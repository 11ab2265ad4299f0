"""Saves in the background: what is written is the state of that moment, one save at a time, and a failure is told."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer import checkpoint
from trainer.checkpoint import Manifest, State, Writers
from trainer.errors import TrainingStopped
from trainer.parts import Part
from trainer.saver import Saver, Snapshot

SLOW_S = 30
"""What a test waits at most for a thread that should come at once."""


def manifest(step: int) -> Manifest:
    return Manifest(step=step, config="", data_digest="d", weights_digest="w", world_size=1, threads=1)


def state_with(value: float) -> State:
    """Weights and one moment, full of `value`."""
    weights, moment = torch.full((4, 3), value), torch.full((4, 3), 10 * value)
    return State([Part("w", weights, (4, 3), 0)], [Part("exp_avg.w", moment, (4, 3), 0)])


def assert_holds(folder: Path, value: float) -> None:
    assert checkpoint.find_damage(folder) is None
    assert checkpoint.read_manifest(folder).step == int(folder.name[5:])
    assert torch.equal(load_file(folder / "model.safetensors")["w"], torch.full((4, 3), value))
    assert torch.equal(load_file(folder / "optimizer.safetensors")["exp_avg.w"], torch.full((4, 3), 10 * value))


class Gate:
    """Holds every save back until it is opened; counts how many are inside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered, self.inside, self.most = threading.Event(), threading.Event(), 0, 0
        save = checkpoint.save

        def held(*arguments: object, **options: object) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.entered.set()
            assert self.open.wait(SLOW_S)
            save(*arguments, **options)
            self.inside -= 1

        monkeypatch.setattr(checkpoint, "save", held)


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, state = Gate(monkeypatch), state_with(1.0)
    with Saver(tmp_path, keep_last=2, asynchronous=True) as saver:
        saver.save(manifest(1), state)
        assert gate.entered.wait(SLOW_S)
        for part in (part for parts in state for part in parts):
            part.tensor.fill_(-1.0)  # the next update, while the save is under way
        assert not (tmp_path / "step_1").exists()
        gate.open.set()
    assert_holds(tmp_path / "step_1", 1.0)


def test_one_save_at_a_time_and_only_the_last_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    threading.Timer(0.2, gate.open.set).start()
    with Saver(tmp_path, keep_last=2, asynchronous=True) as saver:
        for step in (1, 2, 3, 4):
            saver.save(manifest(step), state_with(float(step)))
            assert saver.saved_step == step
    assert gate.most == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_4"]
    assert_holds(tmp_path / "step_3", 3.0)
    assert_holds(tmp_path / "step_4", 4.0)


def test_costs_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Saver(tmp_path, keep_last=2, asynchronous=True) as saver:
        saver.save(manifest(1), state_with(1.0))
        blocked = saver.costs()
        assert set(blocked) == {"perf/save_blocked_s"}  # what the whole save takes is not known yet
        threading.Timer(0.3, gate.open.set).start()
        saver.save(manifest(2), state_with(2.0))  # waits for the first
        saver.wait()
        costs = saver.costs()
        assert blocked["perf/save_blocked_s"] < 0.2 < costs["perf/save_blocked_s"]
        assert costs["perf/save_s"] > 0
        assert saver.costs() == {"perf/save_blocked_s": 0.0}


def test_without_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[State] = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, manifest, state, **options: written.append(state))
    state = state_with(1.0)
    with Saver(tmp_path, keep_last=2, asynchronous=False) as saver:
        saver.save(manifest(1), state)
        assert saver.costs().keys() == {"perf/save_blocked_s", "perf/save_s"}
    assert written[0].model[0].tensor is state.model[0].tensor  # the very tensors, not a copy


def test_a_rank_that_writes_nothing_copies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[State] = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, manifest, state, **options: written.append(state))
    with Saver(tmp_path, keep_last=2, asynchronous=True, writers=Writers(None)) as saver:
        saver.save(manifest(1), state_with(1.0))
    assert written == [State([], [])]


def test_the_buffers_of_a_copy_serve_the_next() -> None:
    snapshot = Snapshot()
    first = snapshot.take(state_with(1.0))
    second = snapshot.take(state_with(2.0))
    for before, after in zip(first, second, strict=True):
        assert before[0].tensor.data_ptr() == after[0].tensor.data_ptr()
    assert torch.equal(second.optimizer[0].tensor, torch.full((4, 3), 20.0))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_told_in_one_line_and_the_one_before_stays(asynchronous: bool, tmp_path: Path) -> None:
    failures: list[str] = []
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    saver = Saver(folder, keep_last=1, asynchronous=asynchronous, on_failure=failures.append)
    saver.save(manifest(1), state_with(1.0))
    saver.wait()
    shutil.move(folder, tmp_path / "moved")
    folder.write_text("a file in its place")
    with pytest.raises(TrainingStopped) as caught:
        saver.save(manifest(2), state_with(2.0))
        saver.wait()
    message = str(caught.value)
    assert message.startswith(f"{folder}/step_2: the checkpoint cannot be written (Not a directory); earlier ones are")
    assert failures == [message] and "\n" not in message
    assert_holds(tmp_path / "moved" / "step_1", 1.0)


def test_an_error_of_our_own_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError), Saver(tmp_path, keep_last=1, asynchronous=True) as saver:
        saver.save(manifest(1), state_with(1.0))


def test_a_run_that_stops_waits_for_the_save_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    threading.Timer(0.2, gate.open.set).start()
    with pytest.raises(TrainingStopped, match="loss nan"), Saver(tmp_path, keep_last=1, asynchronous=True) as saver:
        saver.save(manifest(1), state_with(1.0))
        raise TrainingStopped("loss nan")
    assert_holds(tmp_path / "step_1", 1.0)
