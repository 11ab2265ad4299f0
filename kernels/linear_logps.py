"""Log-probabilities of target tokens from hidden states, without building the (N, V) logits.

The vocabulary is walked in slabs. The forward keeps a running maximum and sum of exponentials a row; the backward computes
a slab's logits again and writes its part of the head's gradient once.
Shapes: N scored tokens, D width, V vocabulary, B columns of a slab.
"""

import torch
from torch import Tensor

from kernels.reference import compute_dtype

SLAB = 2048


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = compute_dtype(hidden.dtype)
        count = hidden.shape[0]
        peak = torch.full((count,), -torch.inf, dtype=wide)
        total = torch.zeros(count, dtype=wide)
        picked = torch.zeros(count, dtype=wide)
        for start in range(0, weight.shape[0], SLAB):
            logits = (hidden @ weight[start : start + SLAB].T).to(wide)
            inside = (targets >= start) & (targets < start + logits.shape[1])
            index = (targets - start).clamp(0, logits.shape[1] - 1)
            picked += logits.gather(1, index[:, None]).squeeze(1) * inside
            new_peak = torch.maximum(peak, logits.amax(1))
            total = total * (peak - new_peak).exp() + (logits - new_peak[:, None]).exp().sum(1)
            peak = new_peak
        lse = peak + total.log()
        ctx.save_for_backward(hidden, weight, targets, lse)
        return picked - lse

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, targets, lse = ctx.saved_tensors
        wide = lse.dtype
        grad_hidden = torch.zeros(hidden.shape, dtype=wide)
        grad_weight = torch.zeros_like(weight)
        for start in range(0, weight.shape[0], SLAB):
            part = weight[start : start + SLAB]
            dlogits = -((hidden @ part.T).to(wide) - lse[:, None]).exp()
            inside = ((targets >= start) & (targets < start + part.shape[0])).to(wide)
            index = (targets - start).clamp(0, part.shape[0] - 1)
            dlogits.scatter_add_(1, index[:, None], inside[:, None])
            dlogits = (dlogits * grad[:, None]).to(weight.dtype)
            grad_hidden += dlogits @ part
            torch.mm(dlogits.T, hidden, out=grad_weight[start : start + SLAB])
        return grad_hidden.to(hidden.dtype), grad_weight, None


def linear_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, stash: bool = False, impl: str = "auto") -> Tensor:
    """log softmax(hidden @ weight.T) at `targets`, (N,) float32.

    hidden (N, D) and weight (V, D) of the same dtype, targets (N,) int64 in [0, V).
    """
    return _LinearLogps.apply(hidden, weight, targets)
