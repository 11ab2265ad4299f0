"""The CPU path of `linear_logps`: PyTorch operators in an order that needs no (N, V) matrix. They run on any device.

The vocabulary is walked in slabs of columns, so each slab's part of the head's gradient is one product, written once,
in a fixed order. What is computed of a slab is

    exps[n, v] = exp(logit[n, v] - center[n])      with the target's own entry taken out,

so that logp = -log(1 + sum(exps) * exp(center - target_logit)): never positive, and exact for a token that the model
is sure of. `center` is subtracted inside the product, before its result is rounded: as bfloat16, a logit of 20 is
wrong by up to 0.06, while its distance to the row's largest logit is small where it matters. A row's center starts at
its target's logit and is raised when a slab shows that it lies too low (`_Sums.raise_centers`). With a softcap the
logit is not the product, which then is rounded as plain PyTorch rounds it.

Four ways to the gradient, counted in products of 2*N*D*V floating-point operations:
    recompute       4   forward, the slab once more, and two products with it; some slabs are kept (`KEPT_SHARE`)
    stash           3   `exps` of every slab is kept, in the weight's dtype: N*V numbers
    frozen head     2   the gradient by `hidden` is summed up in the forward, as attention sums its output
    no gradient     1
Not here: checks of the inputs (`linear_logps`), collectives. Derived for this project; the running rescale is that of
Milakov and Gimelshein 2018 (online softmax).

Letters: N scored tokens, D width, V vocabulary, B columns of a slab. "wide": float32, float64 for float64 inputs, the
dtype of a slab while it is worked on, of sums, and of every (N,) number of the forward.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.head import HeadOptions, LinearLogps, Partials
from kernels.reference import compute_dtype
from kernels.vocabulary_slabs import KEPT_SHARE, Slab, cut_slabs, make_room

LOG2E = math.log2(math.e)

# A slab whose exponentials add up to more than this raises the row's center. bfloat16: logit - center stays below
# log 4 = 1.4, which keeps its rounding under 4e-3. Otherwise: below log 64 = 4.2, far from overflow and from where the
# rounding of an exponent shows. Few rows are computed twice.
RAISE_ABOVE = {torch.bfloat16: 4.0, torch.float32: 64.0, torch.float64: 64.0}

# center - log normaliser is held above this: what lies lower has a probability of 1e-22 at most, and exp of its
# negative, by which the target's entry is multiplied, must not overflow.
LOWEST_GAP = -55.0


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in their own dtype, rounded to what `dtype` holds: a center enters the product in the inputs' dtype."""
    return values.to(dtype).to(values.dtype)


def _exp_(logits: Tensor) -> Tensor:
    """exp, in place."""
    return logits.mul_(LOG2E).exp2_()  # half the time of exp_ on a CPU


class _Head:
    """hidden (N, D), weight (V, D), bias (V,) or None and the softcap: what the logits are made of; and room to work.

    The scale is in `hidden` already.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
        self.hidden, self.weight, self.softcap = hidden, weight, softcap
        self.wide = compute_dtype(hidden.dtype)
        self.bias = None if bias is None else bias.to(self.wide)
        self.center_in_product = hidden.dtype != self.wide and softcap is None
        # then the bias has to be in the product too: one more column of `weight`, and of `hidden` one of ones
        self.left = hidden if bias is None or not self.center_in_product else F.pad(hidden, (0, 1), value=1.0)
        self.scratch = hidden.new_empty(0, dtype=self.wide)

    def part(self, slab: Slab) -> Tensor:
        return self.weight[slab.start : slab.stop]

    def target_logits(self, targets: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The logits at `targets` and with a softcap their slopes, (N,) wide, and the weights behind them, (N, D)."""
        weights = self.weight.index_select(0, targets)
        logits = (self.hidden.to(self.wide) * weights).sum(1)
        slope = self.new_slope(logits)
        bias = None if self.bias is None else self.bias.index_select(0, targets)
        return self._finish(logits, bias, slope), slope, weights

    def centered_logits(
        self, slab: Slab, center: Tensor, product: Tensor, rows: Tensor | None = None, slope: Tensor | None = None
    ) -> Tensor:
        """logits - center of a slab, (N, B) wide; of all rows, or of `rows` (K,), whose centers are `center` (K,).

        product (N, B), in the inputs' dtype, is written over; where that dtype is wide, it is what is returned.
        slope (N, B) wide, or None: the derivative of the capped logits by the uncapped ones is written into it.
        """
        left, part, column = self.left if rows is None else self.left[rows], self.part(slab), center[:, None]
        bias = None if self.bias is None else self.bias[slab.start : slab.stop]
        if self.center_in_product:
            right = part if bias is None else torch.cat((part, bias.to(part.dtype)[:, None]), 1)
            torch.addmm(-column.to(product.dtype), left, right.T, out=product)
            return self.widened(product) if rows is None else product.to(self.wide)
        # in wide dtypes subtracting afterwards is as exact, and faster
        torch.mm(left, part.T, out=product)
        logits = self.widened(product) if rows is None else product.to(self.wide)
        return self._finish(logits, bias, slope).sub_(column)

    def _finish(self, products: Tensor, bias: Tensor | None, slope: Tensor | None = None) -> Tensor:
        """Bias and softcap, in place."""
        if bias is not None:
            products += bias
        if self.softcap is None:
            return products
        products.div_(self.softcap).tanh_()
        if slope is not None:  # 1 - tanh^2, from tanh itself: near 1, each rounding on a way back to it would show
            torch.square(products, out=slope).neg_().add_(1.0)
        return products.mul_(self.softcap)

    def new_slope(self, logits: Tensor) -> Tensor | None:
        """Room for the slopes of `logits`, in their shape, wide, where there is a softcap."""
        return None if self.softcap is None else torch.empty_like(logits, dtype=self.wide)

    def widened(self, values: Tensor) -> Tensor:
        """`values` wide: themselves, or a copy in a scratch matrix that is made once."""
        if values.dtype == self.wide:
            return values
        if len(self.scratch) < values.numel():
            self.scratch = self.scratch.new_empty(values.numel())
        return self.scratch[: values.numel()].view(values.shape).copy_(values)


class _Sums:
    """What the forward carries from slab to slab, (N,) unless said otherwise; None where it is not asked for.

    center: see the module. others: sum of exp(logit - center) over all tokens but the target. weighted (N, D): sum of
    exp(logit - center) * slope * weight[v] over the same. moment: sum of exp(logit - center) * (logit - center) over
    the same. top, seen: the largest logit, and the target's, both as the products gave them.
    """

    def __init__(self, head: _Head, target_logits: Tensor, options: HeadOptions, *, with_weighted: bool) -> None:
        self.head = head
        self.center = _rounded(target_logits, head.hidden.dtype)
        self.others = torch.zeros_like(target_logits)
        self.weighted = torch.zeros_like(head.hidden, dtype=head.wide) if with_weighted else None
        self.moment = torch.zeros_like(target_logits) if options.with_entropy else None
        self.top = torch.full_like(target_logits, -torch.inf) if options.with_argmax else None
        self.seen = torch.zeros_like(target_logits)

    def add(self, slab: Slab, exps: Tensor, *, keep: bool) -> None:
        """Add up a slab. exps (N, B), in the inputs' dtype: room to work in; with `keep`, holds exp * slope then."""
        keep = keep or self.weighted is not None
        slope = self.head.new_slope(exps) if keep else None
        values = self.head.centered_logits(slab, self.center, exps, slope=slope)
        if self.top is not None:
            torch.maximum(self.top, values.amax(1) + self.center, out=self.top)
            self.seen[slab.rows] = values[slab.rows, slab.columns] + self.center[slab.rows]
        logits = values.clone() if self.moment is not None else None
        sums = self._sum_without_targets(_exp_(values), slab)
        high = (sums > RAISE_ABOVE[exps.dtype]).nonzero().squeeze(1)
        if len(high):
            again = self._raise_centers(high, sums[high], slab)
            if logits is not None:
                logits[high] = again
            values[high] = _exp_(again)
            sums = self._sum_without_targets(values, slab)
        self.others += sums
        if logits is not None:
            self.moment += logits.mul_(values).sum(1)
        if not keep:
            return
        if slope is not None:
            values *= slope
        if values is not exps:
            exps.copy_(values)
        if self.weighted is not None:
            self.weighted += exps @ self.head.part(slab)

    def _sum_without_targets(self, exps: Tensor, slab: Slab) -> Tensor:
        exps[slab.rows, slab.columns] = 0.0
        return exps.sum(1)

    def _raise_centers(self, rows: Tensor, sums: Tensor, slab: Slab) -> Tensor:
        """Move the centers of `rows` (K,) up by the log of the slab's `sums` (K,); if that is inf, to its top logit.

        Returns the rows' logits minus the new centers, (K, B).
        """
        product = self.head.hidden.new_empty(len(rows), slab.stop - slab.start)
        old = self.center[rows]
        step = sums.log()
        if not torch.isfinite(sums).all():
            tops = self.head.centered_logits(slab, old, product, rows).amax(1)
            step = torch.where(torch.isfinite(sums), step, tops)
        new = _rounded(old + step, product.dtype)
        scale = torch.exp(old - new)
        # a new tensor, because the stash remembers the old centers
        self.center = self.center.index_copy(0, rows, new)
        if self.moment is not None:
            self.moment[rows] = scale * (self.moment[rows] + (old - new) * self.others[rows])
        self.others[rows] *= scale
        if self.weighted is not None:
            self.weighted[rows] *= scale[:, None]
        return self.head.centered_logits(slab, new, product, rows)

    def logps(self, target_logits: Tensor) -> Tensor:
        """(N,): minus the softplus of the log-odds of all other tokens against the target."""
        log_odds = self.others.log() + (self.center - target_logits)
        return -F.softplus(log_odds, threshold=40.0)  # the default, 20, is not exact enough for float64

    def total(self, target_logits: Tensor) -> Tensor:
        """The sum of exp(logit - center), the target's too where its logit is not -inf."""
        return self.others + torch.exp(target_logits - self.center)

    def entropy(self, target_logits: Tensor) -> Tensor | None:
        if self.moment is None:
            return None
        total, above = self.total(target_logits), target_logits - self.center
        return total.log() - (self.moment + above.exp() * above) / total


def _normaliser(center: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The log of a row's sum of exponentials (N,), and what was lost (N,) by rounding it to one number.

    A logit of 300 minus a normaliser of 300 is off by 3e-5 in float32, and so would every gradient be.
    """
    log_total = center + total.log()
    return log_total, (total * torch.exp(center - log_total)).log()


def _gap(center: Tensor, normaliser: tuple[Tensor, Tensor]) -> Tensor:
    """center - normaliser, (N,): exps * exp(gap) are probabilities."""
    return (center - normaliser[0] - normaliser[1]).clamp(min=LOWEST_GAP)


def _put_target_entries(exps: Tensor, slab: Slab, pull: Tensor, gap: Tensor) -> None:
    """Write the targets' entries, so that exps * exp(gap) is minus the gradient of a log-probability by the product.

    pull (N,): that gradient at the target.
    """
    rows = slab.rows
    exps[rows, slab.columns] = (-pull[rows] * torch.exp(-gap[rows])).to(exps.dtype)


class _LinearLogps(torch.autograd.Function):
    """Which way the gradient is found follows from `stash` and from which inputs ask for one (see the module)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        columns: Tensor,
        options: HeadOptions,
        grad_enabled: bool,
    ) -> tuple[Tensor | None, ...]:
        """columns (N,): the targets' rows in `weight`; outside [0, V) where they lie in another part.

        Returns logps, entropy and argmax_hit; without gradient, where there is no `combine`, a part's partials.
        """
        by_hidden, by_weight, by_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        in_backward = by_weight or by_bias
        head = _Head(hidden, weight, bias, options.softcap)
        inside = (columns >= 0) & (columns < len(weight))
        # a row without its target here starts at the logit of some token that is
        first_logits, first_slope, first_weights = head.target_logits(columns.clamp(0, len(weight) - 1))
        target_logits = first_logits.masked_fill(~inside, -torch.inf)
        sums = _Sums(head, first_logits, options, with_weighted=by_hidden and not in_backward)
        slabs = cut_slabs(columns, len(weight))
        own = (math.inf if options.stash else KEPT_SHARE * weight.numel()) if in_backward else 0
        room = make_room(hidden, slabs, own, weight.new_empty(weight.shape) if by_weight else None)
        centers = []
        for slab in slabs:
            sums.add(slab, room.place(slab), keep=room.keeps(slab))
            centers.append(sums.center)
        if options.vocab_start is None:
            logps, normaliser = sums.logps(target_logits), _normaliser(sums.center, sums.total(target_logits))
        else:
            partials = sums.center, sums.total(target_logits), target_logits
            if options.combine is None:
                return partials
            center, total, whole_target_logits = options.combine(*partials)
            normaliser = _normaliser(center, total)
            logps = whole_target_logits - normaliser[0] - normaliser[1]
        # 1 - p comes from logp through expm1: as a difference of rounded numbers it would be lost for an almost sure
        # token
        pull = -torch.expm1(logps)
        if first_slope is not None:
            pull = pull * first_slope
        for slab, center in zip(slabs, centers, strict=True):
            if room.keeps(slab):
                _put_target_entries(room.place(slab), slab, pull, _gap(center, normaliser))
        if in_backward:
            ctx.softcap, ctx.centers, ctx.lent = options.softcap, centers, room.lent
            ctx.room = replace(room, work=None, kept=None, lent=None)
            ctx.save_for_backward(hidden, weight, bias, columns, pull, *normaliser, room.kept)
        elif by_hidden:
            ctx.hidden_dtype = hidden.dtype
            share = torch.exp(_gap(sums.center, normaliser))[:, None] * sums.weighted
            ctx.save_for_backward((pull * inside)[:, None] * first_weights - share)
        extras = sums.entropy(target_logits), None if sums.top is None else sums.seen >= sums.top
        ctx.mark_non_differentiable(*(extra for extra in extras if extra is not None))
        return logps, *extras

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight, by_bias = ctx.needs_input_grad[:3]
        if not (by_weight or by_bias):
            (gradient,) = ctx.saved_tensors
            return (grad[:, None] * gradient).to(ctx.hidden_dtype), None, None, None, None, None
        hidden, weight, bias, columns, pull, *normaliser, kept = ctx.saved_tensors
        head, slabs = _Head(hidden, weight, bias, ctx.softcap), cut_slabs(columns, len(weight))
        room = replace(ctx.room, work=hidden.new_empty(len(hidden) * slabs[0].stop), kept=kept, lent=ctx.lent)
        grad_weight = room.lent
        if by_weight and _graph_is_kept():  # a second backward will need what is kept in the gradient's memory
            grad_weight = torch.empty_like(room.lent)
        else:
            ctx.lent = None  # autograd takes a gradient as it is where nobody else holds it
        grad_hidden = torch.zeros_like(hidden, dtype=head.wide) if by_hidden else None
        grad_bias = torch.empty_like(bias) if by_bias else None
        top = _rounded(normaliser[0], hidden.dtype)
        factors = _Factors(hidden, grad, normaliser)
        for slab, kept_center in reversed(list(zip(slabs, ctx.centers, strict=True))):
            exps = room.place(slab)
            factor, scaled_hidden = factors.at(kept_center if room.keeps(slab) else top)
            if not room.keeps(slab):
                _recompute(head, slab, top, exps, pull, _gap(top, normaliser))
            if grad_bias is not None:
                grad_bias[slab.start : slab.stop] = head.widened(exps).T @ factor
            if grad_hidden is not None:
                grad_hidden.addcmul_(factor[:, None], exps @ head.part(slab))
            if grad_weight is not None:  # may write over exps
                grad_weight[slab.start : slab.stop] = exps.T @ scaled_hidden
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None


def _graph_is_kept() -> bool:
    """Whether the backward that runs was called with retain_graph=True. PyTorch 2.13 says so to itself alone."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


class _Factors:
    """factor (N,): exps * factor is the gradient of the loss by the product; and factor * hidden (N, D).

    The factor belongs on exps, but (N, D) is the smaller matrix. From one slab to the next, few rows change.
    """

    def __init__(self, hidden: Tensor, grad: Tensor, normaliser: tuple[Tensor, Tensor]) -> None:
        self.hidden, self.grad, self.normaliser = hidden, grad, normaliser
        self.center = torch.full_like(grad, torch.nan)
        self.factor, self.scaled_hidden = torch.empty_like(grad), torch.empty_like(hidden)

    def at(self, center: Tensor) -> tuple[Tensor, Tensor]:
        rows = (center != self.center).nonzero().squeeze(1)
        if len(rows):
            self.center = center
            self.factor = -(self.grad * torch.exp(_gap(center, self.normaliser)))
            self.scaled_hidden[rows] = (self.factor[rows, None] * self.hidden[rows]).to(self.hidden.dtype)
        return self.factor, self.scaled_hidden


def _recompute(head: _Head, slab: Slab, center: Tensor, exps: Tensor, pull: Tensor, gap: Tensor) -> None:
    """Fill `exps` (N, B) with what the stash would hold of the slab, for these centers."""
    slope = head.new_slope(exps)
    values = head.centered_logits(slab, center, exps, slope=slope)
    _exp_(values)
    if slope is not None:
        values *= slope
    if values is not exps:
        exps.copy_(values)
    _put_target_entries(exps, slab, pull, gap)


def run(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: HeadOptions
) -> LinearLogps | Partials:
    """`linear_logps` as its docstring defines it, for inputs that have been checked."""
    if hidden.dtype not in RAISE_ABOVE:
        raise ValueError(f"linear_logps: the CPU path does not take {hidden.dtype}; use bfloat16 or float32")
    if options.scale != 1.0:
        hidden = hidden * options.scale  # autograd scales the gradient; the head's sees the scaled states
    columns = targets - (options.vocab_start or 0)
    found = _LinearLogps.apply(hidden.contiguous(), weight, bias, columns, options, torch.is_grad_enabled())
    return found if options.vocab_start is not None and options.combine is None else LinearLogps(*found)
