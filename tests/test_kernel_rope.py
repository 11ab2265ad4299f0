"""`apply_rope`: values and gradients against float64, the order of the pairs, what it keeps, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.rope import apply_rope

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def make_inputs(tokens: int, heads: int, half: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, H, 2 * half), and cos and sin (T, half) of random angles, float32 (float64 for float64)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, 2 * half, generator=generator).to(dtype)
    angles = 7 * torch.rand(tokens, half, generator=generator)
    angles = angles.double() if dtype == torch.float64 else angles
    return x, angles.cos(), angles.sin()


def run(x: Tensor, cos: Tensor, sin: Tensor, grad: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = apply_rope(x, cos, sin, impl=impl)
    out.backward(grad)
    return out.detach(), x.grad


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 9),
    heads=st.integers(1, 5),
    half=st.integers(1, 33),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
def test_as_good_as_plain_pytorch(tokens: int, heads: int, half: int, dtype: torch.dtype, seed: int) -> None:
    x, cos, sin = make_inputs(tokens, heads, half, dtype, seed)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    truth = run(x.double(), cos.double(), sin.double(), grad.double(), "reference")
    plain, ours = run(x, cos, sin, grad, "reference"), run(x, cos, sin, grad, "cpu")
    for exact, other, value in zip(truth, plain, ours, strict=True):
        assert value.dtype == dtype and value.shape == x.shape
        if tokens:
            error, baseline = (value - exact).abs().max(), (other - exact).abs().max()
            assert error <= 2 * baseline + ROUNDING[dtype], f"{error=} {baseline=} {x.shape}"


def test_by_hand() -> None:
    """A quarter turn takes (a, b) of a pair to (-b, a), and the pairs are i and i + h/2."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, 3.0, 4.0]]])
    angles = torch.tensor([[0.0, 0.0], [math.pi / 2, 0.0]])
    out = apply_rope(x, angles.cos(), angles.sin())
    torch.testing.assert_close(out, torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[-3.0, 2.0, 1.0, 4.0]]]))


def test_a_score_depends_on_the_distance_only() -> None:
    """What rotary embedding is for: q at position 5 against k at 3 scores as q at 12 against k at 10."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, generator=generator).double().unbind()
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01]).double()

    def at(x: Tensor, position: int) -> Tensor:
        angles = position * frequencies[None]
        return apply_rope(x, angles.cos(), angles.sin())

    torch.testing.assert_close((at(q, 5) * at(k, 3)).sum(), (at(q, 12) * at(k, 10)).sum())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradients_by_finite_differences(impl: str) -> None:
    x, cos, sin = make_inputs(3, 2, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda value: apply_rope(value, cos, sin, impl=impl), (x.requires_grad_(),))


def test_takes_a_view_and_leaves_it_alone() -> None:
    """The model rotates q and k as slices of one projection."""
    x, cos, sin = make_inputs(6, 5, 4, torch.float32)
    before = x.clone()
    torch.testing.assert_close(apply_rope(x[:, 1:3], cos, sin), apply_rope(x, cos, sin)[:, 1:3])
    assert torch.equal(x, before)


def test_keeps_only_the_angles() -> None:
    x, cos, sin = make_inputs(10, 3, 8, torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = apply_rope(x.requires_grad_(), cos, sin)
    assert out.requires_grad
    assert [tensor.data_ptr() for tensor in kept] == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x, cos, sin: (x[0], cos, sin), r"x \(T, H, h\).*got \(2, 6\)"),
        (lambda x, cos, sin: (x[..., :5], cos, sin), "even h"),
        (lambda x, cos, sin: (x, cos[:2], sin[:2]), r"\(4, 2, 6\), \(2, 3\), \(2, 3\)"),
        (lambda x, cos, sin: (x, cos, sin[:, :1]), r"\(4, 1\)"),
        (lambda x, cos, sin: (x, cos.clone().requires_grad_(), sin), "cos and sin get no gradient"),
    ],
)
def test_errors_say_what_does_not_fit(change, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        apply_rope(*change(*make_inputs(4, 2, 3, torch.float32)))
