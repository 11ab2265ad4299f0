"""What the implementations of `linear_logps` share: the options, what comes back, and how parts of a vocabulary merge.

Not here: products, gradients, or any collective: a caller whose head is split over processes passes one in.
Letters: N scored tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Partials = tuple[Tensor, Tensor, Tensor]
"""What a part of the vocabulary adds to a row, each (N,) float32 (float64 for float64 inputs).

maxima: the part's largest logit, or a number near it; sums: of exp(logit - maximum) over the part; target logits: -inf
where the target lies in another part.
"""

Combine = Callable[[Tensor, Tensor, Tensor], Partials]
"""Turns one part's partials into those of the whole vocabulary: gathers all parts' and calls `merge_partials`."""


@dataclass(frozen=True)
class HeadOptions:
    """The options of `linear_logps`, as its implementations get them: checked, and with the meaning given there."""

    scale: float = 1.0
    softcap: float | None = None
    with_entropy: bool = False
    with_argmax: bool = False
    stash: bool = False
    vocab_start: int | None = None
    combine: Combine | None = None


class LinearLogps(NamedTuple):
    """What `linear_logps` found of each row; None where it was not asked for."""

    logps: Tensor
    """(N,) nats, float32 (float64 for float64 inputs)."""
    entropy: Tensor | None = None
    """(N,) nats, of the distribution over the vocabulary; without gradient."""
    argmax_hit: Tensor | None = None
    """(N,) bool: no other token has a larger logit than the target."""


def merge_partials(parts: Sequence[Partials]) -> Partials:
    """The partials of the union of disjoint parts of a vocabulary, in the order of `parts` (at least one)."""
    maxima, sums, target_logits = (torch.stack(values) for values in zip(*parts, strict=True))
    top = maxima.amax(0)
    return top, (sums * torch.exp(maxima - top)).sum(0), target_logits.amax(0)
