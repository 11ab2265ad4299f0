"""Rows of metrics: bits survive, each step stands once after a resume, a torn last row is no harm."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError, RunError
from trainer.metrics import MetricsWriter, peak_memory_mib, read_metrics


def write_steps(run_dir: Path, first: int, last: int) -> None:
    writer = MetricsWriter(run_dir)
    writer.cut_after(first - 1)
    for step in range(first, last + 1):
        writer.write({"loss": step / 10, "step": step})
    writer.close()


def test_one_object_a_line_with_step_first_and_names_sorted(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"loss": 0.5, "grad_norm": 2.0, "step": 1, "rewards/margins": -1e-30})
    # On disk before the writer is closed: a killed run keeps its rows.
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == '{"step": 1, "grad_norm": 2.0, "loss": 0.5, "rewards/margins": -1e-30}\n'
    writer.close()


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_reads_back_to_the_same_bits(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    writer = MetricsWriter(run_dir)
    writer.write({"step": 1, "loss": value})
    writer.close()
    (row,) = read_metrics(run_dir)
    assert row["loss"].hex() == value.hex()


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 1}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_steps_must_grow(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 3})
    with pytest.raises(AssertionError, match="step 3 after step 3"):
        writer.write({"step": 3})
    writer.close()


@pytest.mark.parametrize("step", [0, 1, 4, 5, 9])
def test_cut_keeps_the_rows_up_to_the_checkpoint_byte_for_byte(tmp_path: Path, step: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, 1, 5)
    before = path.read_bytes().splitlines(keepends=True)
    MetricsWriter(tmp_path).cut_after(step)
    assert path.read_bytes() == b"".join(before[:step])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_resumed_run_leaves_the_file_of_an_unbroken_one(tmp_path: Path) -> None:
    unbroken, resumed = tmp_path / "a", tmp_path / "b"
    unbroken.mkdir()
    resumed.mkdir()
    write_steps(unbroken, 1, 6)
    write_steps(resumed, 1, 5)
    write_steps(resumed, 4, 6)
    assert (resumed / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def test_a_torn_last_row_is_cut_and_left_out_by_readers(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    MetricsWriter(tmp_path).cut_after(9)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("bad", [b"{broken\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "1"}\n', b"\xff\n"])
def test_a_damaged_row_is_named_and_the_file_left_alone(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + bad + b'{"step": 3}\n'
    path.write_bytes(content)
    for action in (lambda: MetricsWriter(tmp_path).cut_after(1), lambda: read_metrics(tmp_path)):
        with pytest.raises(RunError, match=r"metrics\.jsonl:2: is not a row of metrics") as caught:
            action()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_cut_without_a_file_is_nothing(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).cut_after(0)
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_not_there_names_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be read"):
        read_metrics(tmp_path)


def test_tensors_are_refused(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    with pytest.raises(TypeError):
        writer.write({"step": 1, "loss": torch.tensor(1.0)})  # type: ignore[dict-item]
    writer.close()


def test_tensorboard_gets_the_same_numbers_and_none_twice(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((1, 4), (3, 5)):
        writer = MetricsWriter(tmp_path, tensorboard="on")
        writer.cut_after(first - 1)
        for step in range(first, last + 1):
            writer.write({"step": step, "loss": step + first / 10})
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    # Steps 3 and 4 of the first start are purged: only the second start's stand.
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(s, float(np.float32(v))) for s, v in [(1, 1.1), (2, 2.1), (3, 3.3), (4, 4.3), (5, 5.3)]]


def test_tensorboard_on_needs_it_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    MetricsWriter(tmp_path, tensorboard="auto").write({"step": 1})
    with pytest.raises(ConfigError, match="run.tensorboard = on: TensorBoard is not installed"):
        MetricsWriter(tmp_path, tensorboard="on")


def test_peak_memory_counts_what_was_freed_again() -> None:
    before = peak_memory_mib()
    ballast = bytearray(int((before + 64) * 2**20))
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])
    del ballast
    grown = peak_memory_mib()
    assert grown >= before + 32
    assert json.loads(json.dumps(grown)) == grown
