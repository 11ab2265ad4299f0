"""Log-probabilities of target tokens from given logits, forward and backward; no second (N, V) matrix in float32.

For logits that exist anyway (a head of another kind, an evaluation); training uses `linear_logps`, which has none. The
gradient is an (N, V) matrix in the logits' dtype, or, where the caller allows it, the logits' own memory.
Letters: N rows, V vocabulary. Sums, and every (N,) number, are float32 (float64 for float64 logits).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import dispatch, reference
from kernels.argmax import argmax_of_rows
from kernels.reference import compute_dtype

LOG2E = math.log2(math.e)

SLAB_NUMBERS = 1 << 20
"""Logits that are widened to float32 at a time (a row at least): 4 MiB. A quarter of it is 10 to 20% slower."""


def _slabs(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows after rows, and the same memory each time for their logits in the dtype of sums, (rows, V)."""
    rows, columns = logits.shape
    step = max(1, SLAB_NUMBERS // columns)
    buffer = logits.new_empty(min(step, rows), columns, dtype=compute_dtype(logits.dtype))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        yield part, buffer[: part.stop - start].copy_(logits[part])


def _forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A row's largest logit, the sum of exp(logit - largest) without the target, and target logit - largest, (N,).

    The last two are float64. The largest logit's own 1 is added there: a float32 sum with a 1 in it is rounded as much
    as all that comes later, and the gradient of a likely token that is not the target bears it.
    """
    centers = logits.new_empty(len(logits), dtype=compute_dtype(logits.dtype))
    others = torch.empty_like(centers, dtype=torch.float64)
    rows = torch.arange(len(logits), device=logits.device)
    for part, wide in _slabs(logits):
        own, target, largest = rows[: len(wide)], targets[part], argmax_of_rows(wide)
        centers[part] = wide[own, largest]
        wide.sub_(centers[part, None])
        wide[own, target] = wide[own, largest] = -torch.inf
        others[part] = _exp_(wide).sum(1)
        others[part] += largest != target
    return centers, others, logits[rows, targets].double() - centers


def _backward(
    logits: Tensor,
    targets: Tensor,
    centers: Tensor,
    log_sums: Tensor,
    by_target: Tensor,
    grad: Tensor,
    out: Tensor,
) -> None:
    """Write -grad * exp(logit - center - log_sum), but `by_target` at the targets, into `out`, perhaps `logits`."""
    for part, wide in _slabs(logits):
        # one after the other: their sum would round away log_sum where logits are large
        _exp_(wide.sub_(centers[part, None]).sub_(log_sums[part, None]))
        out[part] = wide.mul_(-grad[part, None])
    out[torch.arange(len(out), device=out.device), targets] = by_target.to(out.dtype)


def _exp_(values: Tensor) -> Tensor:
    return values.mul_(LOG2E).exp2_()  # half the time of exp_ on a CPU


class _LogpsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, inplace: bool, impl: str) -> Tensor:
        forward = dispatch.triton_module("logits_logps").forward if impl == "triton" else _forward
        centers, others, gaps = forward(logits, targets)
        log_sums = torch.log(others + torch.exp(gaps)).to(centers.dtype)
        # a sure target's others are lost in a sum with its own 1, not in their ratio; far below, that would overflow
        ratios = others * torch.exp(-gaps.clamp_min(-30))
        logps = torch.where(gaps > -30, -torch.log1p(ratios), gaps - log_sums).to(centers.dtype)
        ctx.save_for_backward(logits, targets, centers, log_sums, logps)
        ctx.inplace, ctx.impl = inplace, impl
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With p the probabilities: grad * (1 - p) at the target, -grad * p elsewhere."""
        logits, targets, centers, log_sums, logps = ctx.saved_tensors
        backward = dispatch.triton_module("logits_logps").backward if ctx.impl == "triton" else _backward
        out = logits if ctx.inplace else torch.empty_like(logits)
        backward(logits, targets, centers, log_sums, -torch.expm1(logps) * grad, grad, out)
        if ctx.inplace:  # whoever kept the logits for a backward of his own must hear of it: a kernel tells nobody
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None


def logps_from_logits(logits: Tensor, targets: Tensor, *, inplace: bool = False, impl: str = "auto") -> Tensor:
    """log softmax(logits) at `targets`, (N,) nats, float32 (float64 for float64 logits).

    logits (N, V): bfloat16, float16, float32 or float64 (not by Triton). targets (N,) int64 in [0, V). N may be 0.
    inplace: the backward writes the gradient into the memory of `logits`, which are lost: the caller must not read them
        after it, nor go backward twice (PyTorch raises RuntimeError when another operator needs them again). Logits
        whose rows are not contiguous are copied first.
    impl: as `dispatch.resolve` takes it. "reference" builds another (N, V) matrix in float32, and ignores `inplace`.

    A gradient flows into logits, once. Raises ValueError for shapes, dtypes or targets that do not fit, and for
    `inplace` on a leaf of the graph, whose values the caller owns.
    """
    _check(logits, targets)
    if inplace and logits.requires_grad and logits.is_leaf:
        raise ValueError("logps_from_logits: inplace=True would overwrite logits that are a leaf; leave it out")
    impl = dispatch.resolve(impl, logits.device, logits.dtype)
    if impl == "reference":
        return reference.logps_from_logits(logits, targets)
    if len(logits) and (logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]):
        logits = logits.contiguous()
    return _LogpsFromLogits.apply(logits, targets, inplace, impl)


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2 or targets.ndim != 1 or len(logits) != len(targets) or logits.shape[1] == 0:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"logps_from_logits needs logits (N, V) with V > 0 and targets (N,); got {shapes}")
    if not logits.is_floating_point() or targets.dtype != torch.int64:
        raise ValueError(
            f"logps_from_logits: logits are {logits.dtype}, targets {targets.dtype}; "
            "must be of a floating dtype and torch.int64"
        )
    if len(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f"logps_from_logits: targets range from {low} to {high}, the vocabulary from 0 to "
                f"{logits.shape[1] - 1}; leave out the rows that are not scored"
            )
