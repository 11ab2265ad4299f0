"""Slabs of a vocabulary: where the CPU path of `linear_logps` cuts it, and where it keeps what it computes of a slab.

Not here: what is computed. Letters: N rows, D width, V vocabulary, B columns of a slab.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# At N 600 to 2048, D 576, V 49152, 1024 to 4096 columns differ by less than the noise; fewer are slower in bfloat16.
SLAB_COLUMNS = 1024

# Without the stash, the last slabs are kept still, as many as take this share of the room that the head's gradient will
# take: (N, V) numbers are never kept, but at N 2048 and D 576 a seventh of them, which saves 0.14 of the 4 products.
KEPT_SHARE = 0.5


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


def first_kept(slabs: list[Slab], rows: int, width: int, stash: bool) -> int:
    """The column from which on slabs are kept between forward and backward."""
    vocabulary = slabs[-1].stop
    room = math.inf if stash else KEPT_SHARE * vocabulary * width
    return next((slab.start for slab in slabs if rows * (vocabulary - slab.start) <= room), vocabulary)


class Room:
    """Where slabs of `rows` rows are worked on: one place for all before column `kept_from`, then one for each.

    kept: what is kept, from a room that was; without it, new memory in the dtype and on the device of `like`.
    """

    def __init__(self, like: Tensor, slabs: list[Slab], rows: int, kept_from: int, kept: Tensor | None = None) -> None:
        self.rows, self.kept_from = rows, kept_from
        self.work = like.new_empty(rows * min(kept_from, slabs[0].stop))
        self.kept = like.new_empty(rows * (slabs[-1].stop - kept_from)) if kept is None else kept

    def keeps(self, slab: Slab) -> bool:
        return slab.start >= self.kept_from

    def place(self, slab: Slab) -> Tensor:
        """A contiguous (N, B) matrix."""
        flat = self.kept[self.rows * (slab.start - self.kept_from) :] if self.keeps(slab) else self.work
        columns = slab.stop - slab.start
        return flat[: self.rows * columns].view(self.rows, columns)
