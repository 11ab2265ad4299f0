"""Which groups form a global batch, and how a global batch is cut into micro-batches.

Everything here is a pure function of its arguments: no file, no clock, no global random state. So a run resumes from
one integer in constant time, and a restart, another world size or another micro-batch size leaves the order of work as
it was. Losses, streams and collectives live in `trainer`; this module sees group indices and token counts only.

Letters: G groups in the data, B groups in a global batch, M micro-batches of a rank.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

ORDER_VERSION = "logratio-order-1"  # part of the seed: a new rule for the order gets a new name, never a silent change


def num_batches(num_groups: int, global_batch: int) -> int:
    """Global batches in one epoch; the last one is short when `global_batch` does not divide `num_groups`."""
    if num_groups < 0 or global_batch < 1:
        raise ValueError(f"{num_groups=} must be >= 0 and {global_batch=} >= 1")
    return -(-num_groups // global_batch)


def plan_batch(num_groups: int, global_batch: int, *, seed: int, digest: str, epoch: int, k: int) -> np.ndarray:
    """Indices of the groups in global batch `k` of `epoch`, (B,) int64; the last batch of an epoch is short.

    digest: of the data, so that other data gets another order. k: 0 <= k < num_batches(num_groups, global_batch).
    The batches of one epoch together are a permutation of range(num_groups). The first call of an epoch sorts G keys
    (about 0.1 s a million groups); later calls are a slice.
    """
    if not 0 <= k < num_batches(num_groups, global_batch):
        raise ValueError(
            f"batch {k=} is not in 0..{num_batches(num_groups, global_batch) - 1}, the batches of an epoch"
        )
    order = _epoch_order(num_groups, seed, digest, epoch)
    return order[k * global_batch : (k + 1) * global_batch].copy()


@lru_cache(maxsize=4)
def _epoch_order(num_groups: int, seed: int, digest: str, epoch: int) -> np.ndarray:
    """Permutation of range(G): the groups sorted by a random key each.

    numpy promises that a bit generator's raw stream never changes, but not what `Generator.permutation` makes of it;
    sorting raw 64-bit keys therefore gives the same order under every numpy.
    """
    name = f"{ORDER_VERSION}|{digest}|{seed}|{epoch}".encode()
    key = int.from_bytes(hashlib.sha256(name).digest()[:16], "little")
    order = np.argsort(np.random.Philox(key=key).random_raw(num_groups), kind="stable")
    order.setflags(write=False)
    return order


def cut_microbatches(
    indices: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray, *, budget: int, world_size: int, rank: int
) -> list[list[int]]:
    """Micro-batches of one rank, M lists of group indices, longest groups first.

    indices, tokens: (B,) the groups of a global batch and the tokens of each. budget: most tokens in a micro-batch.

    - All ranks' lists together are exactly `indices`, and every rank gets the same M. A rank with fewer than M groups
      ends with empty lists.
    - A micro-batch stays within `budget`; a group longer than that stands alone.
    - Ranks: longest group first, each to the rank with the fewest tokens so far. The loads of any two ranks then
      differ by at most the longest group, since a rank was the least loaded one when it received its last group.
    - Within a rank, groups are sorted by length and cut into M runs whose largest is as small as such runs can be: like
      lengths sit together, and the peak is the mean rather than the budget. The price of sorted runs is some more
      micro-batches than the tightest packing: at most 2 x tokens / budget + 1, near tokens / budget for short groups.
    - Sorted by (tokens, index), so the order in which `indices` arrive does not matter.
    """
    if len(indices) != len(tokens):
        raise ValueError(f"{len(indices)} indices, but {len(tokens)} token counts")
    if budget < 1 or not 0 <= rank < world_size:
        raise ValueError(f"{budget=} must be >= 1, and {rank=} in 0..{world_size - 1}")
    groups = sorted(((int(t), int(i)) for i, t in zip(indices, tokens, strict=True)), key=lambda g: (-g[0], g[1]))
    shares = _spread_over_ranks(groups, world_size)
    sizes = [[t for t, _ in share] for share in shares]
    count = max(len(_cut(share_sizes, budget)) for share_sizes in sizes)
    ends = _cut(sizes[rank], _smallest_limit(sizes[rank], count, budget), at_least=count)
    runs = [[i for _, i in shares[rank][start:end]] for start, end in pairwise([0, *ends])]
    return runs + [[] for _ in range(count - len(runs))]


def _spread_over_ranks(groups: list[tuple[int, int]], world_size: int) -> list[list[tuple[int, int]]]:
    """(tokens, index) sorted longest first -> one list a rank, each still sorted; ties go to the lower rank."""
    shares: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for group in groups:
        lightest = loads.index(min(loads))
        shares[lightest].append(group)
        loads[lightest] += group[0]
    return shares


def _cut(sizes: list[int], limit: int, at_least: int = 0) -> list[int]:
    """End positions of consecutive runs whose sums stay within `limit` (a larger single size stands alone).

    Greedy, which gives the fewest runs there can be; then runs are kept short towards the end so that there are
    `at_least` of them, or one a size when there are too few sizes.
    """
    ends: list[int] = []
    total = 0
    for position, size in enumerate(sizes):
        left_for_later_runs = at_least - len(ends) - 1
        full = total + size > limit or len(sizes) - position <= left_for_later_runs
        if position > 0 and full:
            ends.append(position)
            total = 0
        total += size
    return ends + [len(sizes)] if sizes else []


def _smallest_limit(sizes: list[int], count: int, budget: int) -> int:
    """Smallest limit, at most `budget`, that still cuts `sizes` into at most `count` runs (bisection)."""
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_cut(sizes, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return low
