"""`dispatch`: which name leads to which implementation, what is said, and the choice of the matmul precision."""

import logging

import pytest
import torch

from kernels import dispatch, reference
from kernels import linear_logps as linear_logps_module
from kernels.dispatch import MatmulReading, choose_matmul_precision, resolve
from kernels.linear_logps import linear_logps


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._say_once.cache_clear()


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
