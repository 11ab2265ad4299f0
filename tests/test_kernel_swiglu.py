"""`swiglu`: values and gradients against float64 and by hand, errors."""

import math

import pytest
import torch
from torch import Tensor

from kernels.swiglu import swiglu

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(5,), (4, 33), (0, 8)])
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against the formulas written out in float64: silu = g s, its slope s (1 + g (1 - s)), s the sigmoid of g."""
    generator = torch.Generator().manual_seed(len(shape))
    gate, up, grad = ((4 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3))
    gate.requires_grad_()
    up.requires_grad_()
    out = swiglu(gate, up)
    out.backward(grad)
    wide_gate, wide_up, wide_grad = gate.detach().double(), up.detach().double(), grad.double()
    sigmoid = 1 / (1 + (-wide_gate).exp())
    expected = [
        (out, wide_gate * sigmoid * wide_up),
        (gate.grad, wide_grad * wide_up * sigmoid * (1 + wide_gate * (1 - sigmoid))),
        (up.grad, wide_grad * wide_gate * sigmoid),
    ]
    for value, exact in expected:
        assert value.dtype == dtype
        # two roundings on the way, three in the gradient by the gate
        torch.testing.assert_close(value.double(), exact, rtol=3 * ROUNDING[dtype], atol=8 * ROUNDING[dtype])


def test_by_hand() -> None:
    """silu(0) = 0, silu(log 3) = log 3 * 3/4; a gate of -100 shuts."""
    out = swiglu(torch.tensor([0.0, math.log(3), -100.0]), torch.tensor([5.0, 4.0, 7.0]))
    torch.testing.assert_close(out, torch.tensor([0.0, 3 * math.log(3), 0.0]))


@pytest.mark.parametrize(
    ("up", "problem"), [(torch.ones(2, 3), r"\(2, 4\).*\(2, 3\)"), (torch.ones(2, 4).bfloat16(), "float32.*bfloat16")]
)
def test_errors_say_what_differs(up: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        swiglu(torch.ones(2, 4), up)
