"""Every operator in plain PyTorch: the definition of correct that the fast versions are tested against.

Not for training: `linear_logps` here builds the whole (N, V) matrix of logits.
Shapes: N scored tokens, D width, V vocabulary, T tokens, H heads, h head width.
"""

import torch
from torch import Tensor

from kernels.head import Combine, HeadOptions, LinearLogps, Partials


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and exponentials are taken in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """scale * hidden @ weight.T + bias, capped: (N, D), (V, D), (V,) -> (N, V) float32 (float64 for float64).

    `scale` as Cohere's models multiply their logits, softcap * tanh(logit / softcap) as Gemma 2 caps them.
    """
    wide = compute_dtype(hidden.dtype)
    logits_NV = (hidden @ weight.T).to(wide)
    if scale != 1.0:  # no pass over the logits for nothing: this is what others are timed against
        logits_NV = scale * logits_NV
    if bias is not None:
        logits_NV = logits_NV + bias.to(wide)
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(head_logits) at `targets`: (N, D), (V, D), (N,) int64 -> (N,) float32 (float64 for float64)."""
    logits_NV = head_logits(hidden, weight, bias, scale=scale, softcap=softcap)
    return torch.log_softmax(logits_NV, dim=-1).gather(1, targets[:, None]).squeeze(1)


def run_linear_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: HeadOptions
) -> LinearLogps | Partials:
    """`linear_logps` with all its options."""
    logits_NV = head_logits(hidden, weight, bias, scale=options.scale, softcap=options.softcap)
    if options.vocab_start is not None:
        return _logps_of_part(logits_NV, targets - options.vocab_start, options.combine)
    all_logps_NV = torch.log_softmax(logits_NV, dim=-1)
    column_N1 = targets[:, None]
    entropy = hit = None
    if options.with_entropy:
        entropy = torch.special.entr(all_logps_NV.detach().exp()).sum(1)
    if options.with_argmax:
        hit = (logits_NV <= logits_NV.gather(1, column_N1)).all(1)
    return LinearLogps(all_logps_NV.gather(1, column_N1).squeeze(1), entropy, hit)


def _logps_of_part(logits_NV: Tensor, columns: Tensor, combine: Combine | None) -> LinearLogps | Partials:
    """logits_NV: of this part of the vocabulary. columns (N,): the targets' places, outside [0, V) in another part."""
    inside = (columns >= 0) & (columns < logits_NV.shape[1])
    picked = logits_NV.gather(1, torch.where(inside, columns, 0)[:, None]).squeeze(1)
    values = logits_NV.detach()
    maxima = values.amax(1)
    sums = (values - maxima[:, None]).exp().sum(1)
    partials = maxima, sums, picked.detach().masked_fill(~inside, -torch.inf)
    if combine is None:
        return partials
    maxima, sums, target_logits = combine(*partials)
    normaliser = maxima + sums.log()
    # its derivative by this part's logits is onehot - probability; its value does not matter
    carrier = torch.where(inside, picked, 0) - (logits_NV - normaliser[:, None]).exp().sum(1)
    return LinearLogps(target_logits - normaliser + (carrier - carrier.detach()))


def logps_from_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits) at `targets`: (N, V), (N,) int64 -> (N,) float32 (float64 for float64)."""
    all_logps_NV = torch.log_softmax(logits.to(compute_dtype(logits.dtype)), dim=-1)
    return all_logps_NV.gather(1, targets[:, None]).squeeze(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: (..., D), (D,) -> (..., D) (Zhang and Sennrich 2019).

    The statistics are float32; the normalised value is rounded to x's dtype before the product with `weight`, as
    Llama checkpoints expect it.
    """
    wide = x.to(compute_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype) * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(total, rms_norm(total)) with total = x + residual: (..., D), (..., D) or None, (D,) -> (..., D) twice."""
    total = x if residual is None else x + residual
    return total, rms_norm(total, weight, eps)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, elementwise (Shazeer 2020); "silu", or "gelu_tanh": gelu by its tanh form, as in Gemma."""
    functional = torch.nn.functional
    return (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) @ weight.T: (T, F), (T, F), (D, F) -> (T, D) (Shazeer 2020, eq. 6, without bias)."""
    return gated(gate, up, "silu") @ weight.T


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + h/2]) of each head: (T, H, h), (T, h/2), (T, h/2) -> (T, H, h) (Su et al. 2021).

    The half-split order of Hugging Face checkpoints, not the interleaved one. float32 inside, rounded to x's dtype.
    """
    wide = compute_dtype(x.dtype)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
