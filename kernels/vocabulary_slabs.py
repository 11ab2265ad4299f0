"""Slabs of a vocabulary: where the CPU path of `linear_logps` cuts it, and where it keeps what it computes of a slab.

Not here: what is computed. Letters: N rows, D width, V vocabulary, B columns of a slab.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# At N 600 to 2048, D 576, V 49152, 1024 to 4096 columns differ by less than the noise; fewer are slower in bfloat16.
SLAB_COLUMNS = 1024

# Without the stash, the last slabs are kept still: as many as fit where the head's gradient will be, which is made in
# the forward and lent to them until the backward writes it, and this share of as many again. At N 2048 and D 576 they
# are half of all slabs, which saves half of one of 4 products, for 0.75 * V * D numbers.
KEPT_SHARE = 0.75


class Slab(NamedTuple):
    """Columns [start, stop) of the vocabulary, and the targets among them: at (rows[k], start + columns[k])."""

    start: int
    stop: int
    rows: Tensor
    columns: Tensor


def cut_slabs(targets: Tensor, vocabulary: int) -> list[Slab]:
    """Targets outside [0, vocabulary) are in no slab."""
    ordered, order = torch.sort(targets, stable=True)
    edges = [*range(0, vocabulary, SLAB_COLUMNS), vocabulary]
    firsts = torch.searchsorted(ordered, torch.tensor(edges, device=targets.device)).tolist()
    return [
        Slab(start, stop, order[first:last], ordered[first:last] - start)
        for start, stop, first, last in zip(edges[:-1], edges[1:], firsts[:-1], firsts[1:], strict=True)
    ]


@dataclass(frozen=True)
class Room:
    """Where the (N, B) matrices of slabs lie: those that are kept from forward to backward, and one for all others.

    Slabs from column `kept_from` on have places of their own, in `kept`, and from `lent_from` on in `lent`: the
    gradient (V, D) of the head, which the backward then writes from its end to its start. A slab's rows of it never
    overlap the place of a slab before: its place begins at number N * (start - lent_from), its rows at D * start, which
    is no less at start = lent_from, nor, because all places fit, at V, and so nowhere between. Its own place may
    overlap.
    """

    rows: int
    kept_from: int
    lent_from: int
    work: Tensor
    kept: Tensor
    lent: Tensor | None

    def keeps(self, slab: Slab) -> bool:
        return self.kept_from <= slab.start

    def place(self, slab: Slab) -> Tensor:
        """A contiguous (N, B) matrix: the slab's own, or the one for all that are not kept."""
        flat, first = self.work, slab.start
        if self.keeps(slab) and slab.start < self.lent_from:
            flat, first = self.kept, self.kept_from
        elif self.keeps(slab):
            flat, first = self.lent.view(-1), self.lent_from
        columns = slab.stop - slab.start
        return flat[self.rows * (slab.start - first) :][: self.rows * columns].view(self.rows, columns)


def make_room(hidden: Tensor, slabs: list[Slab], own: float, lent: Tensor | None) -> Room:
    """Room for matrices in the dtype of hidden (N, D): the last slabs are kept, in `lent` and in `own` numbers more."""
    rows, vocabulary = len(hidden), slabs[-1].stop

    def first_of(numbers: float) -> int:
        """Where the last slabs begin whose matrices fit in so many numbers."""
        return next((slab.start for slab in slabs if rows * (vocabulary - slab.start) <= numbers), vocabulary)

    lent_from = vocabulary if lent is None else first_of(lent.numel())
    kept_from = first_of(own + rows * (vocabulary - lent_from))
    work, kept = (hidden.new_empty(rows * columns) for columns in (slabs[0].stop, lent_from - kept_from))
    return Room(rows, kept_from, lent_from, work, kept, lent)
