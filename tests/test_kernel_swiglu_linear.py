"""SwiGLU with the linear layer behind it: values, gradients, what it keeps, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.swiglu_linear import swiglu_linear

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # four roundings of half a unit, of the largest magnitude


def inputs(rows: int, inner: int, outer: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, inner), (rows, inner), (outer, inner))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def results(function, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, grad)]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    inner=st.integers(1, 33),
    outer=st.integers(1, 17),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_no_worse_than_plain_pytorch(rows: int, inner: int, outer: int, dtype: torch.dtype, seed: int) -> None:
    tensors = inputs(rows, inner, outer, dtype, seed)
    grad = torch.randn(rows, outer, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    truth = results(reference.swiglu_linear, wide, grad.double())
    plain = results(reference.swiglu_linear, tensors, grad)
    for ours, theirs, true in zip(results(swiglu_linear, tensors, grad), plain, truth, strict=True):
        error, baseline = (ours.double() - true).abs().max(), (theirs.double() - true).abs().max()
        assert error <= 2 * baseline + ROUNDING[dtype] * true.abs().max(), f"{error=} {baseline=}"


def test_gradients_are_derivatives() -> None:
    assert torch.autograd.gradcheck(swiglu_linear, inputs(3, 5, 4, torch.float64))


def test_one_number_by_hand() -> None:
    # silu(1) = 1 / (1 + e^-1) = 0.7310586; times up 2, times weight 3
    out = swiglu_linear(torch.ones(1, 1), torch.full((1, 1), 2.0), torch.full((1, 1), 3.0))
    torch.testing.assert_close(out, torch.tensor([[6 * 0.7310586]]))


def test_keeps_gate_up_and_weight_only() -> None:
    tensors = inputs(4, 6, 5, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu_linear(*tensors)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in tensors]


def test_frozen_weight_gets_no_gradient() -> None:
    gate, up, weight = inputs(4, 6, 5, torch.float32)
    swiglu_linear(gate, up, weight.detach()).sum().backward()
    assert gate.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize(
    ("gate", "up", "weight", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), torch.ones(5, 3), "needs gate and up"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 5), "needs gate and up"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(5, 3).double(), "must be the same"),
    ],
)
def test_refuses_what_does_not_fit(gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu_linear(gate, up, weight)
