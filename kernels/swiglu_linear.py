"""SwiGLU and GeGLU, alone or with the linear layer behind them: act(gate) * up, (act(gate) * up) @ weight.T.

Keeps gate and up only: autograd of the single steps keeps act(gate) and the product as well, twice the memory. Here the
backward computes them again. The matrix products are the vendor's library's; Triton does what lies between them.
Letters: T rows, F inner width, D outer width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch, reference


def gated_cpu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return active.mul_(up)


def _backward(
    gate: Tensor, up: Tensor, grad: Tensor, activation: str, with_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients by gate and up, and act(gate) * up where it is asked for; `grad` is by that product."""
    by_active = grad * up
    if activation == "silu":
        active, by_gate = F.silu(gate), torch.ops.aten.silu_backward(by_active, gate)
    else:
        active = F.gelu(gate, approximate="tanh")
        by_gate = torch.ops.aten.gelu_backward(by_active, gate, approximate="tanh")
    product = torch.mul(active, up, out=by_active) if with_product else None
    return by_gate, active.mul_(grad), product


def _run(gate: Tensor, up: Tensor, weight: Tensor | None, activation: str, impl: str) -> Tensor:
    forward = dispatch.triton_module("swiglu_linear").forward if impl == "triton" else gated_cpu
    product = forward(gate, up, activation)
    return product if weight is None else product @ weight.T


class _Gated(torch.autograd.Function):
    """(gate, up, weight or None, activation, impl) -> act(gate) * up, times weight.T where there is one."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor | None, activation: str, impl: str) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.activation, ctx.impl = activation, impl
        return _run(gate, up, weight, activation, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        by_product = grad if weight is None else grad @ weight
        backward = dispatch.triton_module("swiglu_linear").backward if ctx.impl == "triton" else _backward
        by_gate, by_up, product = backward(gate, up, by_product, ctx.activation, ctx.needs_input_grad[2])
        return by_gate, by_up, None if product is None else grad.T @ product, None, None


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up, elementwise, in the inputs' shape and dtype, which must be the same (Shazeer 2020).

    impl: as `dispatch.resolve` takes it. Gradients flow into both, once. Raises ValueError if shapes or dtypes differ.
    """
    return _gated("swiglu", "silu", gate, up, None, impl)


def geglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """gelu(gate) * up, elementwise: like `swiglu`, with the tanh form of gelu, as Gemma has it."""
    return _gated("geglu", "gelu_tanh", gate, up, None, impl)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """(silu(gate) * up) @ weight.T: (T, F), (T, F), (D, F) -> (T, D), all of one dtype (Shazeer 2020).

    impl: as `dispatch.resolve` takes it. Gradients flow into all three, once. Raises ValueError if shapes or dtypes do
    not fit.
    """
    return _gated("swiglu_linear", "silu", gate, up, weight, impl)


def geglu_linear(gate: Tensor, up: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """(gelu(gate) * up) @ weight.T: like `swiglu_linear`, with the tanh form of gelu, as Gemma has it."""
    return _gated("geglu_linear", "gelu_tanh", gate, up, weight, impl)


def _gated(operator: str, activation: str, gate: Tensor, up: Tensor, weight: Tensor | None, impl: str) -> Tensor:
    _check(operator, gate, up, weight)
    impl = dispatch.resolve(impl, gate.device, gate.dtype)
    if impl == "reference":
        product = reference.gated(gate, up, activation)
        return product if weight is None else product @ weight.T
    if not torch.is_grad_enabled():  # autograd takes longer than a few rows do
        return _run(gate, up, weight, activation, impl)
    return _Gated.apply(gate, up, weight, activation, impl)


def _check(operator: str, gate: Tensor, up: Tensor, weight: Tensor | None) -> None:
    if weight is None:
        if gate.shape != up.shape or gate.dtype != up.dtype:
            raise ValueError(
                f"{operator}: gate is {gate.dtype} {tuple(gate.shape)}, up {up.dtype} {tuple(up.shape)}; "
                "must be the same"
            )
        return
    if gate.shape != up.shape or gate.ndim != 2 or weight.ndim != 2 or weight.shape[1] != gate.shape[1]:
        raise ValueError(
            f"{operator} needs gate and up (T, F) and weight (D, F); "
            f"got {tuple(gate.shape)}, {tuple(up.shape)}, {tuple(weight.shape)}"
        )
    if not gate.dtype == up.dtype == weight.dtype:
        raise ValueError(f"{operator}: dtypes {gate.dtype}, {up.dtype}, {weight.dtype} must be the same")
