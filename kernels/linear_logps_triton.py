"""`linear_logps` by Triton: which tiles, sources and slabs, the launches, and the gradients. Kernels are next door.

The forward sums up tiles of logits; what is left to add over tiles is (tiles, N) and done here in PyTorch. The backward
goes through the vocabulary in slabs: a kernel writes a slab's gradient by the logits in the weight's dtype, and two
products of the vendor's library use it. Four ways to the gradient, counted in products of 2*N*D*V operations:
    recompute       4   forward, the slab once more, and two products with it
    stash           3   the forward keeps every logit, less its tile's largest, in the weight's dtype: N*V numbers
    frozen head     2   the gradient by `hidden` is summed up in the forward, as attention sums its output
    no gradient     1
No atomics, and every sum in a fixed order: repeats are equal bit for bit.

Not measured on any GPU yet: choices that only a reading can justify say so.
Letters: N rows, D width, V vocabulary (or the part of it that `weight` is).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import linear_logps_kernels_triton as jit
from kernels.head import HeadOptions, LinearLogps, Partials
from kernels.linear_logps_plan import GIVEN_ROWS, GIVEN_STAGES, GIVEN_WARPS, GROUP, Plan, choose_plan


class _Sums(NamedTuple):
    """What a forward kernel writes of tiles of logits, float32; see there."""

    maxima: Tensor
    others: Tensor
    weighted: Tensor | None
    target_logits: Tensor

    def of_tiles(self, tiles: slice) -> "_Sums":
        weighted = None if self.weighted is None else self.weighted[tiles]
        return _Sums(self.maxima[tiles], self.others[tiles], weighted, self.target_logits)


class _Rows(NamedTuple):
    """What a backward kernel needs of a row, each (N,) float32; see there."""

    centers: Tensor
    log_sums: Tensor
    target_factors: Tensor
    grads: Tensor


@dataclass(frozen=True)
class _Head:
    """The inputs of one call, for the launches. targets (N,) int32: the column of the target, if it is one of V."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    options: HeadOptions
    plan: Plan

    def slabs(self) -> Iterator[slice]:
        for start in range(0, len(self.weight), self.plan.slab):
            yield slice(start, min(start + self.plan.slab, len(self.weight)))

    def tiles_of(self, slab: slice) -> slice:
        columns = self.plan.tiles.columns
        return slice(slab.start // columns, triton.cdiv(slab.stop, columns))

    def new_logits(self, most_columns: int) -> Tensor:
        """Room for that many columns of V, or all, in whole tiles: (N, columns) in the weight's dtype."""
        columns = triton.cdiv(min(most_columns, len(self.weight)), self.plan.tiles.columns) * self.plan.tiles.columns
        return self.weight.new_empty(len(self.hidden), columns)

    def new_sums(self) -> _Sums:
        shape = triton.cdiv(len(self.weight), self.plan.tiles.columns), len(self.hidden)
        maxima, others, weighted = (self.hidden.new_empty(shape, dtype=torch.float32) for _ in range(3))
        target_logits = self.hidden.new_full(shape[1:], -torch.inf, dtype=torch.float32)
        return _Sums(maxima, others, weighted if self.options.with_entropy else None, target_logits)

    def sum_up(self, slab: slice, sums: _Sums, kept: Tensor | None) -> None:
        """Write the slab's tiles of `sums`, and where it is given `kept` (N, B): logit - maximum of its tile."""
        outputs = (*sums.of_tiles(self.tiles_of(slab)), kept, 0 if kept is None else kept.stride(0), slab.start)
        if self.plan.backend == "fused":
            self._launch_gemm(jit.forward_gemm, slab, outputs)
        else:
            self._launch_given(jit.forward_given, slab, self._product(slab), (), outputs)

    def differentiate(self, slab: slice, rows: _Rows, out: Tensor) -> None:
        """Write the gradient by the slab's scale * hidden @ weight.T + bias into `out` (N, B)."""
        outputs = (*rows, out, out.stride(0), slab.start)
        if self.plan.backend == "fused":
            self._launch_gemm(jit.backward_gemm, slab, outputs)
        else:
            self._launch_given(jit.backward_given, slab, self._product(slab), (None,), outputs)

    def differentiate_kept(self, slab: slice, maxima: Tensor, kept: Tensor, rows: _Rows, out: Tensor) -> None:
        """`differentiate` from what `sum_up` wrote: `maxima` of all tiles, `kept` of the slab. `out` may be `kept`."""
        outputs = (*rows, out, out.stride(0), slab.start)
        self._launch_given(jit.backward_given, slab, kept, (maxima[self.tiles_of(slab)],), outputs)

    def _product(self, slab: slice) -> Tensor:
        return wide_product(self.hidden, self.weight[slab].T)

    def _launch_gemm(self, kernel: Any, slab: slice, outputs: tuple) -> None:
        tiles, part = self.plan.tiles, self.weight[slab]
        (rows, width), columns = self.hidden.shape, len(part)
        if not rows:
            return
        by_descriptors = self.plan.source == "descriptors"
        left: Any = self.hidden
        right: Any = part
        if by_descriptors:
            left = TensorDescriptor.from_tensor(left, [tiles.rows, tiles.width])
            right = TensorDescriptor.from_tensor(right, [tiles.columns, tiles.width])
        kernel[triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns),](
            left, right, self._bias(slab), self.targets, *outputs,
            rows, columns, width, self.options.scale, self.options.softcap,
            BLOCK_N=tiles.rows, BLOCK_V=tiles.columns, BLOCK_D=tiles.width, WHOLE_STEPS=width % tiles.width == 0,
            GROUP=GROUP, DESCRIPTORS=by_descriptors, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def _launch_given(self, kernel: Any, slab: slice, logits: Tensor, inputs: tuple, outputs: tuple) -> None:
        columns, tile_columns = slab.stop - slab.start, self.plan.tiles.columns
        if not len(logits):
            return
        kernel[triton.cdiv(len(logits), GIVEN_ROWS) * triton.cdiv(columns, tile_columns),](
            logits, logits.stride(0), *inputs, self._bias(slab), self.targets, *outputs,
            len(logits), columns, self.options.scale, self.options.softcap,
            BLOCK_N=GIVEN_ROWS, BLOCK_V=tile_columns, num_warps=GIVEN_WARPS, num_stages=GIVEN_STAGES,
        )  # fmt: skip

    def _bias(self, slab: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[slab]


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, which a 16-bit product would round away."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # the interpreter's tensors lie in CPU memory, where mm has no out_dtype


class _Found(NamedTuple):
    """The forward's result, each (N,): logps, and a probability is exp(logit - center - log_sum)."""

    logps: Tensor
    centers: Tensor
    log_sums: Tensor
    target_logits: Tensor
    entropy: Tensor | None = None
    argmax_hit: Tensor | None = None

    def target_factors(self, softcap: float | None) -> Tensor:
        """The derivative of logps by the target's scale * hidden @ weight.T + bias, (N,)."""
        others = -torch.expm1(self.logps)  # 1 - probability, without the difference
        return others if softcap is None else others * (1 - (self.target_logits / softcap).square())


def _add_tiles(sums: _Sums) -> tuple[Tensor, Tensor, Tensor]:
    """(largest logit, center, sum of exp(logit - center) without the target), over all tiles, each (N,)."""
    top = sums.maxima.amax(0)
    center = _finite_or_0(top)
    return top, center, (sums.others * torch.exp(sums.maxima - center)).sum(0)


def _finite_or_0(maxima: Tensor) -> Tensor:
    """Where all logits are -inf there is nothing to subtract: -inf - -inf would make it nan."""
    return torch.where(maxima == -torch.inf, 0.0, maxima)


def _find(sums: _Sums, options: HeadOptions) -> _Found:
    top, center, others = _add_tiles(sums)
    gap = sums.target_logits - center
    own = torch.exp(gap)
    log_sum = torch.log(others + own)
    # a sure target's others are lost in others + own, not in their ratio; far below, the ratio would overflow
    logps = torch.where(gap > -30, -torch.log1p(others * torch.exp(-gap)), gap - log_sum)
    entropy = hit = None
    if sums.weighted is not None:
        shift = _finite_or_0(sums.maxima) - center
        weighted = ((sums.weighted + shift * sums.others) * torch.exp(sums.maxima - center)).sum(0)
        weighted = weighted + torch.where(own > 0, own * gap, 0.0)
        entropy = (log_sum - weighted / (others + own)).clamp_min(0)
    if options.with_argmax:
        hit = sums.target_logits >= top
    return _Found(logps, center, log_sum, sums.target_logits, entropy, hit)


def _partials(sums: _Sums) -> Partials:
    top, center, others = _add_tiles(sums)
    return top, others + torch.exp(sums.target_logits - center), sums.target_logits


def _find_with_other_parts(sums: _Sums, options: HeadOptions) -> _Found:
    top, total, target_logits = options.combine(*_partials(sums))
    center, log_sum = _finite_or_0(top), torch.log(total)
    return _Found(target_logits - center - log_sum, center, log_sum, target_logits)


class _WeightedSum:
    """Of the rows of `weight`: the sum of exp(logit - center) * d logit * weight[v] without the target, (N, D) float32.

    d logit is the derivative of softcap. `center` (N,) rises to `top`, the largest logit of the slabs so far.
    """

    def __init__(self, head: _Head) -> None:
        self.head = head
        rows = len(head.hidden)
        self.top = head.hidden.new_full((rows,), -torch.inf, dtype=torch.float32)
        self.negative = torch.zeros_like(head.hidden, dtype=torch.float32)
        self.zeros = torch.zeros_like(self.top)
        self.ones = torch.ones_like(self.top)

    def add(self, slab: slice, sums: _Sums, kept: Tensor) -> None:
        """Add what `sum_up` kept of the slab, and overwrite it."""
        top = torch.maximum(self.top, sums.maxima[self.head.tiles_of(slab)].amax(0))
        center = _finite_or_0(top)
        self.negative *= torch.exp(self.top - center)[:, None]
        self.top = top
        rows = _Rows(center, log_sums=self.zeros, target_factors=self.zeros, grads=self.ones)
        self.head.differentiate_kept(slab, sums.maxima, kept, rows, kept)
        self.negative += wide_product(kept, self.head.weight[slab])

    def gradient(self, found: _Found) -> Tensor:
        """d logps / d (scale * hidden), (N, D) float32."""
        head = self.head
        is_here = (head.targets >= 0) & (head.targets < len(head.weight))
        own = torch.where(is_here, found.target_factors(head.options.softcap), 0.0)
        target_weight = head.weight.index_select(0, torch.where(is_here, head.targets, 0))
        others = torch.exp(_finite_or_0(self.top) - found.centers - found.log_sums)
        return own[:, None] * target_weight + others[:, None] * self.negative


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
        plan: Plan,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        by_hidden, *by_head = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        head = _Head(hidden, weight, bias, targets, options, plan)
        stash = head.new_logits(len(weight)) if options.stash and any(by_head) else None
        weighted_sum = _WeightedSum(head) if by_hidden and not any(by_head) else None
        sums = _sum_up(head, stash, weighted_sum)
        found = _find(sums, options) if options.combine is None else _find_with_other_parts(sums, options)
        ctx.options, ctx.plan = options, plan
        if any(by_head):
            of_rows = found.centers, found.log_sums, found.target_factors(options.softcap)
            ctx.save_for_backward(
                hidden, weight, bias, targets, *of_rows, stash, sums.maxima if options.stash else None
            )
        elif weighted_sum is not None:
            ctx.save_for_backward(weighted_sum.gradient(found))
            ctx.hidden_dtype = hidden.dtype
        ctx.mark_non_differentiable(*(t for t in (found.entropy, found.argmax_hit) if t is not None))
        return found.logps, found.entropy, found.argmax_hit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight, by_bias = ctx.needs_input_grad[:3]
        scale = ctx.options.scale
        if not (by_weight or by_bias):
            (gradient,) = ctx.saved_tensors
            return ((scale * grad)[:, None] * gradient).to(ctx.hidden_dtype), *[None] * 6
        hidden, weight, bias, targets, *of_rows, stash, maxima = ctx.saved_tensors
        head = _Head(hidden, weight, bias, targets, ctx.options, ctx.plan)
        rows = _Rows(*of_rows, grad.contiguous())
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if by_hidden else None
        grad_weight = torch.empty_like(weight) if by_weight else None
        grad_bias = torch.empty_like(bias) if by_bias else None
        buffer = head.new_logits(head.plan.slab)
        for slab in head.slabs():
            by_logits = buffer[:, : slab.stop - slab.start]
            if stash is None:
                head.differentiate(slab, rows, by_logits)
            else:  # not into the stash: a graph that is kept goes backward again
                head.differentiate_kept(slab, maxima, stash[:, slab], rows, by_logits)
            if grad_hidden is not None:
                grad_hidden += wide_product(by_logits, weight[slab])
            if grad_weight is not None:
                grad_weight[slab].addmm_(by_logits.T, hidden, beta=0, alpha=scale)
            if grad_bias is not None:
                grad_bias[slab] = by_logits.sum(0, dtype=torch.float32)
        if grad_hidden is not None:
            grad_hidden = (scale * grad_hidden).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, *[None] * 4


def _sum_up(head: _Head, stash: Tensor | None = None, weighted_sum: _WeightedSum | None = None) -> _Sums:
    sums = head.new_sums()
    one_launch = head.plan.backend == "fused" and weighted_sum is None
    buffer = head.new_logits(head.plan.slab) if weighted_sum is not None else None
    for slab in [slice(0, len(head.weight))] if one_launch else head.slabs():
        kept = stash[:, slab] if stash is not None else None
        if buffer is not None:
            kept = buffer[:, : slab.stop - slab.start]
        head.sum_up(slab, sums, kept)
        if weighted_sum is not None:
            weighted_sum.add(slab, sums, kept)
    return sums


def run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    plan: Plan | None = None,
) -> LinearLogps | Partials:
    """`linear_logps` on checked inputs, as `linear_logps.linear_logps` describes it.

    plan: `choose_plan` unless given. Raises ValueError for float64.
    """
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"linear_logps: the Triton kernels have no {hidden.dtype}; use impl 'cpu' or 'reference'")
    hidden, weight = hidden.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    plan = plan or choose_plan(hidden, options=options)
    columns = (targets - (options.vocab_start or 0)).to(torch.int32)
    if options.vocab_start is not None and options.combine is None:
        return _partials(_sum_up(_Head(hidden, weight, bias, columns, options, plan)))
    return LinearLogps(*_LinearLogps.apply(hidden, weight, bias, columns, options, plan, torch.is_grad_enabled()))
