"""Log-probabilities of target tokens from hidden states: the public operator, which checks and picks an implementation.

The definition is `reference.linear_logps`; `linear_logps_cpu` and `linear_logps_triton` compute it, forward and
backward, without an (N, V) matrix. Not here: a batch axis, masks, sums over tokens, collectives.
Letters: N scored tokens, D width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch, linear_logps_cpu, reference
from kernels.head import Combine, HeadOptions, LinearLogps, Partials

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    with_entropy: bool = False,
    with_argmax: bool = False,
    stash: bool = False,
    vocab_start: int | None = None,
    combine: Combine | None = None,
    impl: str = "auto",
) -> Tensor | LinearLogps | Partials:
    """log softmax(logits) at `targets`, (N,) nats, float32 (float64 for float64 inputs).

    logits = softcap * tanh(s / softcap) with s = scale * hidden @ weight.T + bias; without `softcap`, s.
    hidden (N, D), weight (V, D), bias (V,): the same dtype, float32, bfloat16 or float64 (float16 where an
        implementation takes it). targets (N,) int64 in [0, V). N may be 0.
    with_entropy, with_argmax: return a `LinearLogps` with these instead of the log-probabilities alone.
    stash: keep N * V numbers in the weight's dtype between forward and backward, which saves one product of four. Used
        only when `weight` or `bias` asks for a gradient. Without it the CPU path keeps 0.75 * V * D numbers at most.
    vocab_start: `weight` and `bias` are a part of the vocabulary, from this token on, and `targets` are tokens of the
        whole. Without `combine`, the part's `Partials` are returned, without gradient. With it, the log-probabilities
        over the whole vocabulary; the gradients of `weight` and `bias` are the part's own, that of `hidden` is the
        part's share: the caller adds up the shares of all parts. Every part must get the same upstream gradient.
    impl: as `dispatch.resolve` takes it. "reference" builds the logits whole.

    Gradients flow into `hidden`, `weight` and `bias`, once (no double backward), and repeat bit for bit at one number
    of threads. Raises ValueError for shapes, dtypes, targets or options that do not fit, and for what the
    implementation does not support.
    """
    _check_tensors(hidden, weight, targets, bias)
    options = HeadOptions(scale, softcap, with_entropy, with_argmax, stash, vocab_start, combine)
    _check_options(options)
    _check_targets(targets, len(weight), vocab_start)
    run = _implementation(impl, hidden)
    if vocab_start is not None and combine is None:
        with torch.no_grad():
            return run(hidden, weight, targets, bias, options)
    found = run(hidden, weight, targets, bias, options)
    return found if with_entropy or with_argmax else found.logps


def _implementation(impl: str, hidden: Tensor) -> Callable[..., Any]:
    name = dispatch.resolve(impl, hidden.device, hidden.dtype)
    if name == "reference":
        return reference.run_linear_logps
    return linear_logps_cpu.run if name == "cpu" else dispatch.triton_module("linear_logps").run


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden, weight, targets))
    if hidden.ndim != 2 or weight.ndim != 2 or targets.ndim != 1:
        raise ValueError(f"linear_logps needs hidden (N, D), weight (V, D) and targets (N,); got {shapes}")
    if hidden.shape[1] != weight.shape[1] or len(hidden) != len(targets) or 0 in weight.shape:
        raise ValueError(f"linear_logps: N or D differs between hidden, weight and targets, or D or V is 0: {shapes}")
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"linear_logps: hidden is {hidden.dtype}, weight {weight.dtype}; must be the same, of {names}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"linear_logps: bias is {tuple(bias.shape)} {bias.dtype}; weight {tuple(weight.shape)} {weight.dtype} "
            f"needs ({len(weight)},) {weight.dtype}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"linear_logps: targets are {targets.dtype}; must be torch.int64")


def _check_options(options: HeadOptions) -> None:
    if options.softcap is not None and not (math.isfinite(options.softcap) and options.softcap > 0):
        raise ValueError(f"linear_logps: softcap {options.softcap}: must be a positive number, or None for no cap")
    if not math.isfinite(options.scale) or options.scale == 0:
        raise ValueError(f"linear_logps: scale {options.scale}: must be a number other than 0")
    if options.vocab_start is None:
        if options.combine is not None:
            raise ValueError("linear_logps: combine without vocab_start; say at which token this part begins")
    elif options.vocab_start < 0:
        raise ValueError(f"linear_logps: vocab_start {options.vocab_start}: must be at least 0")
    elif options.with_entropy or options.with_argmax:
        raise ValueError(
            "linear_logps: with_entropy and with_argmax need the whole vocabulary; leave them out, or pass the whole "
            "weight without vocab_start"
        )


def _check_targets(targets: Tensor, vocabulary: int, vocab_start: int | None) -> None:
    if not len(targets):
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or (vocab_start is None and high >= vocabulary):
        raise ValueError(
            f"linear_logps: targets range from {low} to {high}, the vocabulary from 0 to {vocabulary - 1}; "
            "leave out the rows that are not scored"
        )
