"""Log-probabilities of target tokens from hidden states, forward and backward, without an (N, V) matrix.

The vocabulary is walked in slabs of columns, so each slab's part of the head's gradient is one product, written once,
in a fixed order. What is computed of a slab is

    exps[n, v] = exp(logit[n, v] - center[n])      with the target's own entry taken out,

so that logp = -log(1 + sum(exps) * exp(center - target_logit)): never positive, and exact for a token that the model
is sure of. `center` is subtracted inside the product, before its result is rounded: as bfloat16, a logit of 20 is
wrong by up to 0.06, while its distance to the row's largest logit is small where it matters. A row's center starts at
its target's logit and is raised when a slab shows that it lies too low (`_Sums.raise_centers`).

Four ways to the gradient, counted in products of 2*N*D*V floating-point operations:
    recompute       4   forward, the slab once more, and two products with it
    stash           3   `exps` of every slab is kept, in the weight's dtype: N*V numbers
    frozen head     2   the gradient by `hidden` is summed up in the forward, as attention sums its output
    no gradient     1
Not here: a batch axis, masks, sums over tokens. Derived for this project; the running rescale is that of Milakov and
Gimelshein 2018 (online softmax).

Letters: N scored tokens, D width, V vocabulary, B columns of a slab. Sums, and every (N,) number of the forward, are
float32 (float64 for float64 inputs).
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.head import HeadOptions, LinearLogps
from kernels.reference import compute_dtype

LOG2E = math.log2(math.e)

# At N 600 to 2048, D 576, V 49152, 1024 to 4096 columns differ by less than the noise; fewer are slower in bfloat16.
SLAB_COLUMNS = 1024

# A slab whose exponentials add up to more than this raises the row's center. bfloat16: logit - center stays below
# log 4 = 1.4, which keeps its rounding under 4e-3. Otherwise: below log 64 = 4.2, far from overflow and from where the
# rounding of an exponent shows. Few rows are computed twice.
RAISE_ABOVE = {torch.bfloat16: 4.0, torch.float32: 64.0, torch.float64: 64.0}

# center - log normaliser is held above this: what lies lower has a probability of 1e-22 at most, and exp of its
# negative, by which the target's entry is multiplied, must not overflow.
LOWEST_GAP = -55.0


class _Slab(NamedTuple):
    """Columns [start, stop) of the vocabulary, and the targets among them: at (rows[k], start + columns[k])."""

    start: int
    stop: int
    rows: Tensor
    columns: Tensor


def _cut_slabs(targets: Tensor, vocabulary: int) -> list[_Slab]:
    ordered, order = torch.sort(targets, stable=True)
    edges = [*range(0, vocabulary, SLAB_COLUMNS), vocabulary]
    firsts = torch.searchsorted(ordered, torch.tensor(edges, device=targets.device)).tolist()
    return [
        _Slab(start, stop, order[first:last], ordered[first:last] - start)
        for start, stop, first, last in zip(edges[:-1], edges[1:], firsts[:-1], firsts[1:], strict=True)
    ]


def _slab_of(flat: Tensor, rows: int, slab: _Slab, *, whole: bool) -> Tensor:
    """A contiguous (rows, B) matrix inside a flat buffer, which holds all slabs one after another or one at a time."""
    columns = slab.stop - slab.start
    start = rows * slab.start if whole else 0
    return flat[start : start + rows * columns].view(rows, columns)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in their own dtype, rounded to what `dtype` holds: a center enters the product in the inputs' dtype."""
    return values.to(dtype).to(values.dtype)


def _centered_logits(hidden: Tensor, part: Tensor, center: Tensor, out: Tensor) -> Tensor:
    """hidden @ part.T - center into `out`: (N, D), (B, D), (N,) -> (N, B)."""
    column = center[:, None].to(out.dtype)
    if out.dtype == torch.bfloat16:
        return torch.addmm(-column, hidden, part.T, out=out)
    # in wider dtypes subtracting afterwards is as exact, and faster
    return torch.mm(hidden, part.T, out=out).sub_(column)


def _exp_(logits: Tensor) -> Tensor:
    """exp, in place."""
    if logits.dtype == torch.bfloat16:
        return logits.exp_()
    return logits.mul_(LOG2E).exp2_()  # half the time of exp_ on a CPU


class _Sums:
    """What the forward carries from slab to slab, a row of `hidden` each.

    center (N,): see the module; representable in the inputs' dtype. others (N,): sum of exp(logit - center) over all
    tokens but the target. weighted (N, D) or None: sum of exp(logit - center) * weight[v] over the same.
    """

    def __init__(self, hidden: Tensor, target_logits: Tensor, *, stash: bool, with_weighted: bool) -> None:
        self.hidden = hidden
        self.center = _rounded(target_logits, hidden.dtype)
        self.others = torch.zeros_like(target_logits)
        self.weighted = torch.zeros_like(hidden, dtype=target_logits.dtype) if with_weighted else None
        self.exps_are_used = stash or with_weighted
        self.scratch = torch.empty(0, dtype=target_logits.dtype, device=hidden.device)

    def add(self, part: Tensor, slab: _Slab, exps: Tensor) -> None:
        """Add up the slab with weights `part` (B, D). `exps` (N, B) is room to work in, and holds them where used."""
        _centered_logits(self.hidden, part, self.center, exps)
        wide = _exp_(self._widened(exps))
        sums = self._sum_without_targets(wide, slab)
        high = (sums > RAISE_ABOVE[exps.dtype]).nonzero().squeeze(1)
        if len(high):
            self._raise_centers(high, sums[high], part)
            again = exps.new_empty(len(high), len(part))
            _centered_logits(self.hidden[high], part, self.center[high], again)
            wide[high] = _exp_(again.to(wide.dtype))
            sums = self._sum_without_targets(wide, slab)
        self.others += sums
        if self.exps_are_used and wide is not exps:
            exps.copy_(wide)
        if self.weighted is not None:
            self.weighted += exps @ part

    def _widened(self, logits: Tensor) -> Tensor:
        """`logits` in the dtype of sums: itself, or a copy in a scratch matrix that is made once."""
        if logits.dtype == self.scratch.dtype:
            return logits
        if len(self.scratch) < logits.numel():
            self.scratch = self.scratch.new_empty(logits.numel())
        return self.scratch[: logits.numel()].view(logits.shape).copy_(logits)

    def _sum_without_targets(self, exps: Tensor, slab: _Slab) -> Tensor:
        exps[slab.rows, slab.columns] = 0.0
        return exps.sum(1)

    def _raise_centers(self, rows: Tensor, sums: Tensor, part: Tensor) -> None:
        """Move the centers of `rows` (K,) up by the log of the slab's `sums` (K,); if that is inf, to its top logit."""
        old = self.center[rows]
        new = old + sums.log()
        if not torch.isfinite(sums).all():
            logits = self.hidden[rows].to(old.dtype) @ part.to(old.dtype).T
            new = torch.where(torch.isfinite(sums), new, logits.amax(1))
        new = _rounded(new, self.hidden.dtype)
        scale = torch.exp(old - new)
        # a new tensor, because the stash remembers the old centers
        self.center = self.center.index_copy(0, rows, new)
        self.others[rows] *= scale
        if self.weighted is not None:
            self.weighted[rows] *= scale[:, None]

    def logps(self, target_logits: Tensor) -> Tensor:
        """(N,): minus the softplus of the log-odds of all other tokens against the target."""
        log_odds = self.others.log() + (self.center - target_logits)
        return -F.softplus(log_odds, threshold=40.0)  # the default, 20, is not exact enough for float64

    def normaliser(self, target_logits: Tensor) -> tuple[Tensor, Tensor]:
        """The log of a row's sum of exponentials (N,), and what was lost (N,) by rounding it to one number.

        A logit of 300 minus a normaliser of 300 is off by 3e-5 in float32, and so would every gradient be.
        """
        total = self.others + torch.exp(target_logits - self.center)
        log_total = self.center + total.log()
        return log_total, (total * torch.exp(self.center - log_total)).log()


def _gap(center: Tensor, normaliser: tuple[Tensor, Tensor]) -> Tensor:
    """center - normaliser, (N,): exps * exp(gap) are probabilities."""
    return (center - normaliser[0] - normaliser[1]).clamp(min=LOWEST_GAP)


def _put_target_entries(exps: Tensor, slab: _Slab, logps: Tensor, gap: Tensor) -> None:
    """Write the targets' entries, so that exps * exp(gap) is probability - onehot, minus the gradient by the logits.

    p - 1 comes from logp through expm1: as a difference of rounded numbers it would be lost for an almost sure token.
    """
    rows = slab.rows
    exps[rows, slab.columns] = (torch.expm1(logps[rows]) * torch.exp(-gap[rows])).to(exps.dtype)


class _LinearLogps(torch.autograd.Function):
    """Which way the gradient is found follows from `stash` and from which inputs ask for one (see the module)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, stash: bool, grad_enabled: bool) -> Tensor:
        by_hidden, by_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        stash = stash and by_weight
        rows = len(hidden)
        target_weight = weight.index_select(0, targets)
        target_logits = (hidden.to(compute_dtype(hidden.dtype)) * target_weight).sum(1)
        sums = _Sums(hidden, target_logits, stash=stash, with_weighted=by_hidden and not by_weight)
        slabs = _cut_slabs(targets, len(weight))
        buffer = hidden.new_empty(rows * (len(weight) if stash else min(SLAB_COLUMNS, len(weight))))
        ctx.centers = []
        for slab in slabs:
            sums.add(weight[slab.start : slab.stop], slab, _slab_of(buffer, rows, slab, whole=stash))
            ctx.centers.append(sums.center)
        logps, normaliser = sums.logps(target_logits), sums.normaliser(target_logits)
        if stash:
            for slab, center in zip(slabs, ctx.centers, strict=True):
                _put_target_entries(_slab_of(buffer, rows, slab, whole=True), slab, logps, _gap(center, normaliser))
        if by_weight:
            ctx.save_for_backward(hidden, weight, targets, logps, *normaliser, buffer if stash else None)
        elif by_hidden:
            ctx.hidden_dtype = hidden.dtype
            scale = torch.exp(_gap(sums.center, normaliser))
            ctx.save_for_backward(-torch.expm1(logps)[:, None] * target_weight - scale[:, None] * sums.weighted)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            (by_hidden,) = ctx.saved_tensors
            return (grad[:, None] * by_hidden).to(ctx.hidden_dtype), None, None, None, None
        hidden, weight, targets, logps, *normaliser, stash = ctx.saved_tensors
        rows = len(hidden)
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=logps.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight)
        buffer = hidden.new_empty(rows * min(SLAB_COLUMNS, len(weight))) if stash is None else stash
        center = _rounded(normaliser[0], hidden.dtype)
        for index, slab in enumerate(_cut_slabs(targets, len(weight))):
            part = weight[slab.start : slab.stop]
            exps = _slab_of(buffer, rows, slab, whole=stash is not None)
            if stash is None:
                _exp_(_centered_logits(hidden, part, center, exps))
                _put_target_entries(exps, slab, logps, _gap(center, normaliser))
            else:
                center = ctx.centers[index]
            if stash is not None or index == 0:  # the factor belongs on exps, but (N, D) is the smaller matrix
                factor = -(grad * torch.exp(_gap(center, normaliser)))[:, None]
                scaled_hidden = (factor * hidden).to(weight.dtype)
            torch.mm(exps.T, scaled_hidden, out=grad_weight[slab.start : slab.stop])
            if grad_hidden is not None:
                grad_hidden.addcmul_(factor, exps @ part)
        return grad_hidden if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def run(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: HeadOptions) -> LinearLogps:
    """The CPU path of `linear_logps`, whose inputs have been checked."""
    if hidden.dtype not in RAISE_ABOVE:
        raise ValueError(f"linear_logps: the CPU path does not take {hidden.dtype}; use bfloat16 or float32")
    if bias is not None or options != HeadOptions(stash=options.stash):
        raise ValueError("linear_logps: the CPU path takes no option but stash; use impl='reference'")
    return LinearLogps(_LinearLogps.apply(hidden.contiguous(), weight, targets, options.stash, torch.is_grad_enabled()))
