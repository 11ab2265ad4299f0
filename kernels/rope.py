"""Rotary position embedding on a stream, forward and backward, keeping nothing but the angles.

The pairs are (x[i], x[i + h/2]), the half-split order of Hugging Face checkpoints. The gradient of a rotation is the
rotation back, so neither x nor a temporary is kept. Frequencies and positions are the model's business.
Letters: T tokens, H heads, h head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch, reference
from kernels.reference import compute_dtype


def whole_head(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of half a head, (..., h/2) each, as `rotate_wide` takes them, (..., h): where one pair serves many calls,
    it need not be made in each."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_wide(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rope` without gradient, by tables of `whole_head`, which broadcast to x (T, H, h), in their dtype."""
    wide = x.to(cos.dtype)
    swapped = wide.roll(wide.shape[-1] // 2, -1)
    return (wide * cos).addcmul_(swapped, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """(T, H, h), (T, h/2), (T, h/2) -> (T, H, h). Whole heads at once: on halves, PyTorch's inner loop is too short."""
    wide = compute_dtype(x.dtype)
    tables = whole_head(cos.to(wide)[:, None], (-sin if back else sin).to(wide)[:, None])
    return rotate_wide(x, *tables).to(x.dtype)


class _ApplyRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate = _rotate_of(impl)
        return ctx.rotate(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.rotate(grad, cos, sin, back=True), None, None, None


def _rotate_of(impl: str) -> Callable[..., Tensor]:
    return dispatch.triton_module("rope").rotate if impl == "triton" else _rotate


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto") -> Tensor:
    """Rotate each head's pairs by its token's angles: (T, H, h), (T, h/2), (T, h/2) -> (T, H, h) in x's dtype.

    x: bfloat16, float16, float32 or float64 (not by Triton); cos and sin: float32 (or wider), without gradient. The
    rotation is computed in float32 (float64 for float64) and rounded once. A gradient flows into x, once. impl: as
    `dispatch.resolve` takes it. Raises ValueError if shapes do not fit or an angle asks for a gradient.
    """
    if x.ndim != 3 or x.shape[-1] % 2 or cos.shape != (len(x), x.shape[-1] // 2) or sin.shape != cos.shape:
        shapes = f"{tuple(x.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        raise ValueError(f"apply_rope needs x (T, H, h) with even h, cos and sin (T, h/2); got {shapes}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("apply_rope: cos and sin get no gradient; detach them")
    impl = dispatch.resolve(impl, x.device, x.dtype)
    if impl == "reference":
        return reference.apply_rope(x, cos, sin)
    if not torch.is_grad_enabled():  # autograd takes longer than a few rows do
        return _rotate_of(impl)(x, cos, sin, back=False)
    return _ApplyRope.apply(x, cos, sin, impl)
