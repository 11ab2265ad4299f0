"""Every operator in plain PyTorch: the definition of correct that the fast versions are tested against.

Not for training: `linear_logps` here builds the whole (N, V) matrix of logits.
Shapes: N scored tokens, D width, V vocabulary, T tokens, H heads, h head width.
"""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and exponentials are taken in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T) at `targets`: (N, D), (V, D), (N,) int64 -> (N,) float32 (float64 for float64)."""
    logits_NV = (hidden @ weight.T).to(compute_dtype(hidden.dtype))
    return torch.log_softmax(logits_NV, dim=-1).gather(1, targets[:, None]).squeeze(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: (..., D), (D,) -> (..., D) (Zhang and Sennrich 2019).

    The statistics are float32; the normalised value is rounded to x's dtype before the product with `weight`, as
    Llama checkpoints expect it.
    """
    wide = x.to(compute_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) @ weight.T: (T, F), (T, F), (D, F) -> (T, D) (Shazeer 2020, eq. 6, without bias)."""
    return (torch.nn.functional.silu(gate) * up) @ weight.T


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + h/2]) of each head: (T, H, h), (T, h/2), (T, h/2) -> (T, H, h) (Su et al. 2021).

    The half-split order of Hugging Face checkpoints, not the interleaved one. float32 inside, rounded to x's dtype.
    """
    wide = compute_dtype(x.dtype)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
