"""`rms_norm` and `add_rms_norm`: values and gradients against float64, what they keep, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_of_few

ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8}
EPS = 1e-5


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient by the output."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    return 3 * x, 0.5 + torch.rand(shape[-1], generator=generator).to(dtype), grad


def run(x: Tensor, weight: Tensor, grad: Tensor, impl: str, *, frozen: bool = False) -> list[Tensor | None]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    out = rms_norm(x, weight, EPS, impl=impl)
    out.backward(grad)
    return [out.detach(), x.grad, weight.grad]


@settings(max_examples=30, deadline=None)
@given(
    leading=st.lists(st.integers(1, 6), max_size=2),
    width=st.integers(1, 70),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
def test_as_good_as_plain_pytorch(leading: list[int], width: int, dtype: torch.dtype, seed: int) -> None:
    inputs = make_inputs((*leading, width), dtype, seed)
    truth = run(*(tensor.double() for tensor in inputs), "reference")
    plain, ours = run(*inputs, "reference"), run(*inputs, "cpu")
    for name, exact, other, value in zip(("output", "by x", "by weight"), truth, plain, ours, strict=True):
        error, baseline = (value - exact).abs().max(), (other - exact).abs().max()
        # a width of 1 makes the gradient by x vanish by cancellation: measured against the incoming gradient then
        scale = max(float(exact.abs().max()), float(inputs[2].abs().max()) / 3)
        assert value.dtype == dtype
        assert error <= 2 * baseline + ROUNDING[dtype] * scale, f"{name}: {error=} {baseline=} {inputs[0].shape}"


def test_by_hand() -> None:
    """mean(x^2) of (3, 4) is 12.5; with weight (1, 2) that gives 3 and 8 over the root of 12.5 + eps."""
    out = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.5)
    torch.testing.assert_close(out, torch.tensor([3.0, 8.0]) / math.sqrt(13.0))


def test_bfloat16_is_rounded_before_the_product_with_weight() -> None:
    """Bit for bit what checkpoints were trained with: two roundings, not one."""
    x, weight, _ = make_inputs((64, 96), torch.bfloat16)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    twice = (exact.bfloat16().double() * weight.double()).bfloat16()
    once = (exact * weight.double()).bfloat16()
    ours = rms_norm(x, weight, EPS)
    assert (ours == twice).float().mean() > 0.999  # float32 statistics may flip a tie
    assert (ours == once).float().mean() < 0.9


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradients_by_finite_differences(impl: str) -> None:
    x, weight, _ = make_inputs((2, 3, 5), torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: rms_norm(a, b, EPS, impl=impl), (x.requires_grad_(), weight.requires_grad_())
    )


def test_rows_of_zeros_and_no_rows() -> None:
    out, by_x, _ = run(torch.zeros(2, 4), torch.ones(4), torch.ones(2, 4), "cpu")
    assert not out.any()
    torch.testing.assert_close(by_x, torch.full((2, 4), EPS**-0.5))
    out, by_x, by_weight = run(torch.zeros(0, 4), torch.ones(4), torch.ones(0, 4), "cpu")
    assert out.shape == by_x.shape == (0, 4) and not by_weight.any()


def test_a_frozen_weight_changes_nothing_for_x() -> None:
    inputs = make_inputs((7, 12), torch.float32)
    out, by_x, by_weight = run(*inputs, "cpu", frozen=True)
    assert by_weight is None
    assert torch.equal(by_x, run(*inputs, "cpu")[1])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_weight_in_float32_is_used_unrounded(impl: str) -> None:
    """Gemma's 1 + weight: as bfloat16, 1.003 would be 1. The result is rounded once more than the normalised x."""
    x, _, grad = make_inputs((9, 64), torch.bfloat16)
    weight = torch.full((64,), 1.003)
    out, by_x, by_weight = run(x, weight, grad, impl)
    assert (out.dtype, by_x.dtype, by_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    normed = rms_norm(x, torch.ones(64), EPS, impl="reference").double()
    assert ((out.double() / normed / 1.003 - 1).abs() <= 2**-8).all()
    assert abs((out.double() / normed).mean().item() - 1.003) < 5e-4
    truth = run(x.double(), weight.double(), grad.double(), "reference")
    for found, exact in zip((by_x, by_weight), truth[1:], strict=True):
        assert (found.double() - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_the_input_is_left_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, grad = make_inputs((5, 8), dtype)
        copies = x.clone(), weight.clone(), grad.clone()
        leaf = x.requires_grad_()
        rms_norm(leaf, weight, EPS).backward(grad)
        for tensor, copy in zip((x, weight, grad), copies, strict=True):
            assert torch.equal(tensor, copy)


def test_keeps_x_and_one_number_a_row() -> None:
    x, weight, _ = make_inputs((10, 64), torch.bfloat16)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    def saved_bytes(function) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(x.requires_grad_(), weight.requires_grad_(), EPS)
        assert out.requires_grad
        return sum(kept.values())

    assert saved_bytes(rms_norm) == 10 * 64 * 2 + 64 * 2 + 10 * 4
    assert saved_bytes(reference.rms_norm) > 2.5 * saved_bytes(rms_norm)


@pytest.mark.parametrize(
    ("x", "weight", "problem"),
    [
        (torch.ones(3, 4), torch.ones(5), r"got \(3, 4\) and \(5,\)"),
        (torch.ones(3, 4), torch.ones(1, 4), r"weight \(D,\)"),
        (torch.tensor(1.0), torch.ones(1), r"got \(\) and \(1,\)"),
        (torch.ones(3, 4), torch.ones(4).bfloat16(), "x is torch.float32 and weight torch.bfloat16"),
    ],
)
def test_errors_say_what_does_not_fit(x: Tensor, weight: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        rms_norm(x, weight, EPS)


def run_add(
    x: Tensor, residual: Tensor | None, weight: Tensor, grads: tuple[Tensor, Tensor], impl: str
) -> list[Tensor | None]:
    """[total, normed, gradient by x, by residual, by weight]."""
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
    out = add_rms_norm(*leaves, EPS, impl=impl)
    torch.autograd.backward(out, grads)
    return [*(tensor.detach() for tensor in out), *(None if leaf is None else leaf.grad for leaf in leaves)]


def make_add_inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, first: bool = False) -> list:
    x, weight, grad = make_inputs(shape, dtype, seed)
    residual, _, grad_total = make_inputs(shape, dtype, seed + 1000)
    return [x, None if first else residual, weight, (grad_total, grad)]


def widened(inputs: list) -> list:
    x, residual, weight, grads = inputs
    return [x.double(), None if residual is None else residual.double(), weight.double(), [g.double() for g in grads]]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 6),
    width=st.integers(1, 70),
    dtype=st.sampled_from(list(ROUNDING)),
    first=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_added_norm_is_as_good_as_plain_pytorch(
    rows: int, width: int, dtype: torch.dtype, first: bool, seed: int
) -> None:
    inputs = make_add_inputs((rows, width), dtype, seed, first=first)
    truth = run_add(*widened(inputs), "reference")
    plain, ours = run_add(*inputs, "reference"), run_add(*inputs, "cpu")
    assert torch.equal(ours[0], plain[0])
    for name, exact, other, value in zip(
        ("total", "normed", "by x", "by residual", "by weight"), truth, plain, ours, strict=True
    ):
        if exact is None:
            assert value is None and name == "by residual"
            continue
        assert value.dtype == dtype
        if rows:
            error, baseline = (value - exact).abs().max(), (other - exact).abs().max()
            scale = max(float(exact.abs().max()), *(float(grad.abs().max()) for grad in inputs[3]))
            assert error <= 2 * baseline + ROUNDING[dtype] * scale, f"{name}: {error=} {baseline=} {rows=} {width=}"


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("first", [False, True])
def test_gradients_of_the_added_norm_by_finite_differences(first: bool, impl: str) -> None:
    x, residual, weight, _ = make_add_inputs((2, 3, 5), torch.float64, first=first)
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight) if tensor is not None]

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *residual, weight = rest
        return add_rms_norm(x, residual[0] if residual else None, weight, EPS, impl=impl)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_may_go_unused(used: int) -> None:
    x, residual, weight, grads = make_add_inputs((4, 9), torch.float32)
    found = []
    for impl in ("cpu", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
        add_rms_norm(*leaves, EPS, impl=impl)[used].backward(grads[used])
        found.append([leaf.grad for leaf in leaves])
    for ours, plain in zip(*found, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain)


def test_the_two_gradients_are_added_before_they_are_rounded() -> None:
    """bfloat16: the sum is the exact one rounded once, which a sum of two rounded gradients often is not."""
    inputs = make_add_inputs((64, 96), torch.bfloat16, first=True)  # a residual would be rounded before the norm
    truth = run_add(*widened(inputs), "reference")
    ours, plain = run_add(*inputs, "cpu"), run_add(*inputs, "reference")
    rounded_once = [float((found[2] == truth[2].bfloat16()).float().mean()) for found in (ours, plain)]
    assert rounded_once[0] > 0.99 and rounded_once[1] < 0.9, rounded_once


def test_the_added_norm_keeps_the_total_and_one_number_a_row() -> None:
    x, residual, weight, _ = make_add_inputs((10, 64), torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        total, _ = add_rms_norm(x.requires_grad_(), residual, weight.requires_grad_(), EPS)
    assert [tensor.data_ptr() for tensor in kept[:2]] == [total.data_ptr(), weight.data_ptr()]
    assert [tensor.numel() for tensor in kept[2:]] == [10]


def test_the_added_norm_leaves_its_inputs_alone() -> None:
    x, residual, weight, grads = make_add_inputs((5, 8), torch.float32)
    copies = [tensor.clone() for tensor in (x, residual, weight, *grads)]
    torch.autograd.backward(add_rms_norm(x.requires_grad_(), residual.requires_grad_(), weight, EPS), grads)
    for tensor, copy in zip((x, residual, weight, *grads), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("residual", [torch.ones(3, 5), torch.ones(4), torch.ones(3, 4).bfloat16()])
def test_a_residual_that_does_not_fit_is_refused(residual: Tensor) -> None:
    with pytest.raises(ValueError, match=r"add_rms_norm: residual is .*, x torch.float32 \(3, 4\); must be the same"):
        add_rms_norm(torch.ones(3, 4), residual, torch.ones(4), EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_few_rows_is_the_same(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(576, generator=generator).to(dtype)
    for scale in (1e-3, 1.0, 1e3):
        x = (torch.randn(8, 576, generator=generator) * scale + scale).to(dtype)
        found, exact = rms_norm_of_few(x, weight, 1e-5), rms_norm(x.double(), weight.double(), 1e-5)
        error, other = ((y.double() - exact).abs().max() for y in (found, rms_norm(x, weight, 1e-5)))
        assert error <= 1.5 * other
