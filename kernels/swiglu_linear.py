"""SwiGLU and the linear layer behind it in one: (silu(gate) * up) @ weight.T, keeping gate and up only.

Autograd of the two steps keeps silu(gate) and the product as well, twice the memory. Here the backward computes them
again from one sigmoid, which the gradient of silu needs anyway.
Letters: T rows, F inner width, D outer width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch, reference


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.silu(gate).mul_(up) @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With s = sigmoid(gate), a = gate * s: d a / d gate = s + a - a * s."""
        gate, up, weight = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        inner = silu * up
        grad_weight = grad.T @ inner if ctx.needs_input_grad[2] else None
        grad_inner = torch.mm(grad, weight, out=inner)
        slope = sigmoid.addcmul_(silu, sigmoid, value=-1).add_(silu)
        grad_gate = slope.mul_(up).mul_(grad_inner)
        grad_up = grad_inner.mul_(silu)
        return grad_gate, grad_up, grad_weight


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """(silu(gate) * up) @ weight.T: (T, F), (T, F), (D, F) -> (T, D), all of one dtype (Shazeer 2020).

    impl: as `dispatch.resolve` takes it. Raises ValueError if shapes or dtypes do not fit.
    """
    if gate.shape != up.shape or gate.ndim != 2 or weight.ndim != 2 or weight.shape[1] != gate.shape[1]:
        raise ValueError(
            "swiglu_linear needs gate and up (T, F) and weight (D, F); "
            f"got {tuple(gate.shape)}, {tuple(up.shape)}, {tuple(weight.shape)}"
        )
    if not gate.dtype == up.dtype == weight.dtype:
        raise ValueError(f"swiglu_linear: dtypes {gate.dtype}, {up.dtype}, {weight.dtype} must be the same")
    if dispatch.resolve(impl, gate.device) == "reference":
        return reference.swiglu_linear(gate, up, weight)
    return _SwigluLinear.apply(gate, up, weight)
