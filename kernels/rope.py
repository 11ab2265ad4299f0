"""Rotary position embedding on a stream, forward and backward, keeping nothing but the angles.

The pairs are (x[i], x[i + h/2]), the half-split order of Hugging Face checkpoints. The gradient of a rotation is the
rotation back, so neither x nor a temporary is kept. Frequencies and positions are the model's business.
Letters: T tokens, H heads, h head width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch, reference
from kernels.reference import compute_dtype


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """(T, H, h), (T, h/2), (T, h/2) -> (T, H, h). Whole heads at once: on halves, PyTorch's inner loop is too short."""
    sin = -sin if back else sin
    wide = x.to(compute_dtype(x.dtype))
    full_cos = torch.cat((cos, cos), dim=-1)[:, None].to(wide.dtype)
    full_sin = torch.cat((-sin, sin), dim=-1)[:, None].to(wide.dtype)
    first, second = wide.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return (wide * full_cos).addcmul_(swapped, full_sin).to(x.dtype)


class _ApplyRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate = dispatch.triton_module("rope").rotate if impl == "triton" else _rotate
        return ctx.rotate(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.rotate(grad, cos, sin, back=True), None, None, None


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
    return _ApplyRope.apply(x, cos, sin, impl)
