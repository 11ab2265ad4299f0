"""`dispatch`: which name leads to which implementation, what is said, and the choice of the matmul precision."""

import logging

import pytest
import torch

from kernels import dispatch, reference
from kernels import linear_logps as linear_logps_module
from kernels.dispatch import MatmulReading, choose_matmul_precision, resolve
from kernels.linear_logps import linear_logps
from kernels.logits_logps import logps_from_logits
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.swiglu_linear import swiglu


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._said.clear()


def test_auto_is_the_cpu_path_and_the_variable_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve() == resolve("auto") == "cpu"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert resolve() == "reference"
    assert resolve("cpu") == "cpu"  # what is asked for by name wins


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize(
    ("impl", "problem"), [("triton", "in CPU memory, Triton needs a GPU; use 'cpu'"), ("gpu", "must be one of")]
)
def test_what_cannot_run_is_refused(impl: str, problem: str, variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable:
        monkeypatch.setenv(dispatch.VARIABLE, impl)
    place = dispatch.VARIABLE if variable else "asked for"
    with pytest.raises(ValueError, match=f"'{impl}' .*{place}.*{problem}"):
        resolve("auto" if variable else impl)


def test_triton_on_a_gpu_in_the_interpreter_and_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert resolve("auto", gpu) == resolve("triton", gpu) == "triton"
    assert resolve("cpu", gpu) == "cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", torch.device("cpu")) == "triton"
    assert resolve("auto", torch.device("cpu")) == "cpu"
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert resolve("auto", gpu) == "cpu"
    with pytest.raises(ValueError, match="the package triton is not installed; use 'cpu'"):
        resolve("triton", gpu)


def test_bfloat16_is_refused_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products of bfloat16 are of the bits: log-probs of -1e9, and a run would train on them."""
    pytest.importorskip("triton", reason="the package triton is for Linux only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cpu, rows = torch.device("cpu"), torch.ones(2, 4, dtype=torch.bfloat16)
    assert resolve("triton", cpu, torch.float32) == resolve("triton", torch.device("cuda"), torch.bfloat16) == "triton"
    assert resolve("auto", cpu, torch.bfloat16) == "cpu"
    for function in (
        lambda: linear_logps(rows, rows, torch.tensor([0, 1]), impl="triton"),
        lambda: logps_from_logits(rows, torch.tensor([0, 1]), impl="triton"),
        lambda: rms_norm(rows, rows[0], 1e-5, impl="triton"),
        lambda: apply_rope(rows[None], torch.ones(1, 2), torch.ones(1, 2), impl="triton"),
        lambda: swiglu(rows, rows, impl="triton"),
    ):
        with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly; use float32, or 'cpu'"):
            function()


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kernels"):
        for _ in range(3):
            resolve()
        resolve("reference")
    assert [record.getMessage() for record in caplog.records] == [
        "kernels: cpu (the default)",
        "kernels: reference (asked for)",
    ]


def test_the_operator_runs_what_was_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits in bfloat16 tell the two apart: only the slabs keep a sure token's log-probability."""
    hidden, weight = torch.tensor([[16.0]]).bfloat16(), torch.tensor([[1.0], [0.0]]).bfloat16()
    targets = torch.tensor([0])
    plain = reference.linear_logps(hidden, weight, targets)
    assert not torch.equal(plain, linear_logps(hidden, weight, targets))
    assert torch.equal(plain, linear_logps(hidden, weight, targets, impl="reference"))
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert torch.equal(plain, linear_logps(hidden, weight, targets))
    with pytest.raises(ValueError, match="Triton"):
        linear_logps_module.linear_logps(hidden, weight, targets, impl="triton")


def test_precision_probe_measures_both_and_restores_the_setting() -> None:
    found = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        choice = choose_matmul_precision()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(found)
    for reading in (choice.highest, choice.medium):
        assert 0 < reading.error < 0.1 and reading.milliseconds > 0
    assert choice.highest.error < 1e-5
    better = (
        choice.medium.milliseconds < choice.highest.milliseconds and choice.medium.error <= 2 * choice.highest.error
    )
    assert choice.precision == ("medium" if better else "highest")


def test_the_probe_takes_the_least_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others do on the machine changes wall times and most readings, and with them a choice that must repeat."""
    seconds = iter([9.0, 9.0, 0.5, 0.1, 0.2, 8.0])  # highest and medium in turn; the first of each is not counted
    monkeypatch.setattr(dispatch, "_timed_product", lambda left, right: (left @ right, next(seconds)))
    choice = choose_matmul_precision(4, 4, 4, repeats=3)
    assert (choice.highest.milliseconds, choice.medium.milliseconds) == (200.0, 100.0)
    monkeypatch.undo()
    monkeypatch.setattr(dispatch.time, "perf_counter", None)  # the clock of the wall is not asked
    assert choose_matmul_precision(4, 4, 4, repeats=2).highest.milliseconds >= 0


@pytest.mark.parametrize(
    ("medium", "chosen"),
    [
        (MatmulReading(error=2e-6, milliseconds=1.0), "medium"),
        (MatmulReading(error=2.1e-6, milliseconds=1.0), "highest"),  # as on a processor that rounds to bfloat16
        (MatmulReading(error=1e-6, milliseconds=2.0), "highest"),
    ],
)
def test_medium_must_be_faster_and_not_twice_as_wrong(medium: MatmulReading, chosen: str) -> None:
    highest = MatmulReading(error=1e-6, milliseconds=2.0)
    assert dispatch.choose_precision(highest, medium).precision == chosen
