"""RMSNorm, with the addition to the residual stream in front of it or without, keeping the sum and one number a row.

Autograd of the plain definition keeps a float32 copy of x and the normalised rows, and runs about twice as long: 3.2 ms
against 1.6 ms, forward and backward of (1000, 576) in bfloat16 on one busy CPU thread. Where a sum goes on to the next
layer and into a norm, its two gradients are added in the norm's last pass, in float32, and rounded once.
Letters: R rows (all leading axes), D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch, reference
from kernels.reference import compute_dtype


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """total and normed (..., D) in x's dtype, scale (..., 1) = 1 / sqrt(mean(total^2) + eps) in the dtype of sums."""
    x = x if residual is None else x + residual
    wide = x.to(compute_dtype(x.dtype))
    scale = (torch.linalg.vecdot(wide, wide) / x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    normed = wide * scale if wide is x else wide.mul_(scale).to(x.dtype)
    return x, normed.mul_(weight), scale


def _backward(
    x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor, grad_total: Tensor | None, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """With n = x * scale, g = grad * weight: by x scale * (g - n * mean(g * n)), by weight the sum of grad * n.

    grad_total (..., D) or None: a gradient by x from elsewhere, added to that by x.
    """
    wide = x.to(scale.dtype)
    normed = wide * scale if wide is x else wide.mul_(scale)
    wide_weight, wide_grad = weight.to(scale.dtype), grad.to(scale.dtype)
    work = normed * wide_grad
    grad_weight = work.reshape(-1, len(weight)).sum(0).to(weight.dtype) if with_weight else None
    mean = (work @ wide_weight / len(weight)).unsqueeze(-1)
    torch.mul(wide_grad, wide_weight, out=work).addcmul_(normed, mean, value=-1)
    if grad_total is None:
        return work.mul_(scale).to(x.dtype), grad_weight
    if grad_total.dtype != work.dtype:  # PyTorch's loops over two dtypes are slow; `normed` has served
        grad_total = normed.copy_(grad_total)
    return torch.addcmul(grad_total, work, scale, out=work).to(x.dtype), grad_weight


class _AddRMSNorm(torch.autograd.Function):
    """(x, residual or None, weight, eps, impl) -> (total, normed), total being x + residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, impl: str
    ) -> tuple[Tensor, Tensor]:
        total, normed, scale = _forward_of(impl)(x, residual, weight, eps)
        ctx.impl = impl
        ctx.save_for_backward(total, weight, scale)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        if grad is None:
            grad_x, grad_weight = grad_total, None
        else:
            backward = dispatch.triton_module("rms_norm").backward if ctx.impl == "triton" else _backward
            grad_x, grad_weight = backward(total, weight, scale, grad, grad_total, ctx.needs_input_grad[2])
        return grad_x, grad_x if ctx.needs_input_grad[1] else None, grad_weight, None, None


def _forward_of(impl: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return dispatch.triton_module("rms_norm").forward if impl == "triton" else _forward


def rms_norm_of_few(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of few rows, (..., D), without gradient, in four operations instead of nine; many rows take longer.

    (x, -x) has mean 0 and x's mean square as its variance, so PyTorch's LayerNorm, one operation, normalises it alike.
    """
    width = x.shape[-1]
    doubled = torch.layer_norm(torch.cat((x, -x), dim=-1), (2 * width,), eps=eps)
    return doubled[..., :width] * weight


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, impl: str) -> tuple[Tensor, Tensor]:
    """(total, normed); without gradient not by way of autograd, which takes longer than a few rows do."""
    if not torch.is_grad_enabled():
        return _forward_of(impl)(x, residual, weight, eps)[:2]
    return _AddRMSNorm.apply(x, residual, weight, eps, impl)


def _check(operator: str, x: Tensor, weight: Tensor) -> None:
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"{operator} needs x (..., D) and weight (D,); got {tuple(x.shape)} and {tuple(weight.shape)}")
    if weight.dtype not in (x.dtype, compute_dtype(x.dtype)):
        problem = f"x is {x.dtype} and weight {weight.dtype}; must be the same, or the weight {compute_dtype(x.dtype)}"
        raise ValueError(f"{operator}: {problem}")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: (..., D), (D,) -> (..., D) in x's dtype.

    Both bfloat16, float16, float32 or float64 (not by Triton), and the same, or the weight float32. Statistics are
    float32 (float64 for float64); the normalised value is rounded to x's dtype before the product with `weight`, as
    Llama in `transformers` does it. Gradients flow into x and weight, once. impl: as `dispatch.resolve` takes it;
    Triton takes widths to 8192.
    Raises ValueError if shapes or dtypes do not fit, or the implementation does not support them.
    """
    _check("rms_norm", x, weight)
    impl = dispatch.resolve(impl, x.device, x.dtype)
    if impl == "reference":
        return reference.rms_norm(x, weight, eps)
    return _run(x, None, weight, eps, impl)[1]


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(total, rms_norm(total)) with total = x + residual, in x's dtype: the step between two layers of a decoder.

    x (..., D); residual like x, or None for a total that is x itself, as it is after the embedding; weight (D,); one
    dtype, as for `rms_norm`. Gradients of both results flow into x, residual and weight, once: that by total is added
    in the norm's own pass, rounded once. impl: as `dispatch.resolve` takes it. Raises ValueError if shapes or dtypes do
    not fit.
    """
    _check("add_rms_norm", x, weight)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"add_rms_norm: residual is {residual.dtype} {tuple(residual.shape)}, x {x.dtype} {tuple(x.shape)}; "
            "must be the same"
        )
    impl = dispatch.resolve(impl, x.device, x.dtype)
    if impl == "reference":
        return reference.add_rms_norm(x, residual, weight, eps)
    return _run(x, residual, weight, eps, impl)
