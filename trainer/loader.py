"""From a shard and a step number to this rank's micro-batches. Holds no state besides what it was built from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from data_tools.encode import Group
from data_tools.grouping import cut_microbatches, num_batches, plan_batch
from data_tools.shards import Shard
from trainer import dist

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Loader:
    """The order of work: which groups form a step, and how this rank cuts its share of them."""

    shard: Shard
    global_batch: int
    tokens_per_microbatch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return num_batches(len(self.shard), self.global_batch)

    def step_indices(self, step: int) -> np.ndarray:
        """Groups of the global batch of update `step` (0-based), over all ranks."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return plan_batch(
            len(self.shard), self.global_batch, seed=self.seed, digest=self.shard.digest, epoch=epoch, k=k
        )

    def used_indices(self, total_steps: int) -> list[int]:
        """Every group that a run of `total_steps` touches, ascending."""
        if total_steps >= self.steps_per_epoch:
            return list(range(len(self.shard)))
        return sorted({int(index) for step in range(total_steps) for index in self.step_indices(step)})

    def micro_batches(self, indices: Sequence[int] | np.ndarray) -> list[list[int]]:
        """This rank's micro-batches of a global batch; every rank gets the same number of them."""
        tokens = self.shard.group_tokens[np.asarray(indices, dtype=np.int64)]
        return cut_microbatches(
            indices, tokens, budget=self.tokens_per_microbatch, world_size=dist.world_size(), rank=dist.rank()
        )


def length_sorted_batches(groups: Sequence[Group], budget: int) -> list[list[int]]:
    """Indices into `groups` in runs of at most `budget` tokens, longest first: for scoring, where order is free."""
    if not groups:
        return []
    tokens = [len(group.ids) for group in groups]
    return cut_microbatches(range(len(groups)), tokens, budget=budget, world_size=1, rank=0)


def rounds(batches: Sequence[Batch]) -> Iterator[Batch | None]:
    """This rank's batches, then None until every rank has had as many rounds; every rank iterates to the end.

    Sharded weights are gathered by all ranks together, so a rank runs `batch.idle_stream` where it gets None.
    """
    for number in range(int(dist.max_over_ranks(len(batches)))):
        yield batches[number] if number < len(batches) else None
