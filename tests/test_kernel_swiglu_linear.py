"""SwiGLU and GeGLU, alone and with the linear layer behind them: values, gradients, what they keep and refuse."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.swiglu_linear import geglu, geglu_linear, swiglu, swiglu_linear

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # four roundings of half a unit, of the largest magnitude
LINEAR = [swiglu_linear, geglu_linear]
PLAIN = [swiglu, geglu]


def inputs(rows: int, inner: int, outer: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, inner), (rows, inner), (outer, inner))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def results(function, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, grad)]


@settings(max_examples=40, deadline=None)
@given(
    function=st.sampled_from(LINEAR + PLAIN),
    rows=st.integers(1, 9),
    inner=st.integers(1, 33),
    outer=st.integers(1, 17),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_no_worse_than_plain_pytorch(
    function: Callable, rows: int, inner: int, outer: int, dtype: torch.dtype, seed: int
) -> None:
    tensors = inputs(rows, inner, outer, dtype, seed)[: 3 if function in LINEAR else 2]
    columns = outer if function in LINEAR else inner
    grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]

    def plain(*tensors: torch.Tensor) -> torch.Tensor:
        return function(*tensors, impl="reference")

    truth, theirs = results(plain, wide, grad.double()), results(plain, tensors, grad)
    for value, other, true in zip(results(function, tensors, grad), theirs, truth, strict=True):
        error, baseline = (value.double() - true).abs().max(), (other.double() - true).abs().max()
        assert value.dtype == dtype
        assert error <= 2 * baseline + ROUNDING[dtype] * true.abs().max(), f"{error=} {baseline=}"


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("function", LINEAR + PLAIN)
def test_gradients_are_derivatives(function: Callable, impl: str) -> None:
    tensors = inputs(3, 5, 4, torch.float64)[: 3 if function in LINEAR else 2]
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors, impl=impl), tensors)


def test_one_number_by_hand() -> None:
    # silu(1) = 1 / (1 + e^-1) = 0.7310586; times up 2, times weight 3
    out = swiglu_linear(torch.ones(1, 1), torch.full((1, 1), 2.0), torch.full((1, 1), 3.0))
    torch.testing.assert_close(out, torch.tensor([[6 * 0.7310586]]))
    torch.testing.assert_close(swiglu(torch.ones(1), torch.tensor([2.0])), torch.tensor([2 * 0.7310586]))


def test_gelu_is_its_tanh_form() -> None:
    # at 2 the tanh form is 1.9545977, the exact one, 2 * Phi(2), 1.9544997
    inside = math.sqrt(2 / math.pi) * (2 + 0.044715 * 2**3)
    by_hand = 1 + math.tanh(inside)
    gate, up = torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)
    for impl in ("cpu", "reference"):
        torch.testing.assert_close(geglu(gate, up, impl=impl).item(), 3 * by_hand, rtol=1e-6, atol=0)
        torch.testing.assert_close(geglu_linear(gate, up, up, impl=impl).item(), 9 * by_hand, rtol=1e-6, atol=0)


def test_alone_they_take_any_shape() -> None:
    gate, up = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for function in PLAIN:
        torch.testing.assert_close(function(gate, up).flatten(), function(gate.flatten(), up.flatten()))


@pytest.mark.parametrize("function", LINEAR + PLAIN)
def test_keeps_its_inputs_only(function: Callable) -> None:
    tensors = inputs(4, 6, 5, torch.float32)[: 3 if function in LINEAR else 2]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function(*tensors)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in tensors]


def test_frozen_weight_gets_no_gradient() -> None:
    gate, up, weight = inputs(4, 6, 5, torch.float32)
    swiglu_linear(gate, up, weight.detach()).sum().backward()
    assert gate.grad is not None
    assert weight.grad is None


def test_the_inputs_are_left_alone() -> None:
    for function in LINEAR:
        tensors = inputs(4, 6, 5, torch.float32)
        copies = [tensor.detach().clone() for tensor in tensors]
        function(*tensors).sum().backward()
        for tensor, copy in zip(tensors, copies, strict=True):
            assert torch.equal(tensor, copy)


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


@pytest.mark.parametrize("up", [torch.ones(2, 4), torch.ones(2, 3).double()])
def test_alone_they_refuse_what_differs(up: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"geglu: gate is torch.float32 \(2, 3\), up .*; must be the same"):
        geglu(torch.ones(2, 3), up)
