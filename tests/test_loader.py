"""The order of work: every group once an epoch, each rank its share within the token budget."""

from pathlib import Path

import numpy as np
import pytest
from model_fixtures import random_pairs

from data_tools.encode import EncodeOptions
from data_tools.shards import Shard, open_or_build
from trainer.loader import Loader, length_sorted_batches

OWN_PAIRS = Path(__file__).parent / "golden" / "own_16.jsonl"


@pytest.fixture(scope="module")
def shard(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """The sixteen golden pairs in the tiny model's tokens."""
    cache = tmp_path_factory.mktemp("shards")
    return open_or_build([str(OWN_PAIRS)], model_dir=tiny_model_dir, options=EncodeOptions(), cache_dir=str(cache))


def loader_of(shard: Shard, *, global_batch: int = 5, budget: int = 900, seed: int = 0) -> Loader:
    return Loader(shard, global_batch, budget, seed)


def epoch_of(loader: Loader, epoch: int) -> list[list[int]]:
    steps = loader.steps_per_epoch
    return [loader.step_indices(step).tolist() for step in range(epoch * steps, (epoch + 1) * steps)]


def test_an_epoch_is_every_group_once(shard: Shard) -> None:
    loader = loader_of(shard)
    assert loader.steps_per_epoch == 4
    for epoch in range(3):
        batches = epoch_of(loader, epoch)
        assert [len(batch) for batch in batches] == [5, 5, 5, 1]
        assert sorted(index for batch in batches for index in batch) == list(range(16))


def test_epochs_and_seeds_differ_and_nothing_else_decides(shard: Shard) -> None:
    assert epoch_of(loader_of(shard), 0) != epoch_of(loader_of(shard), 1)
    assert epoch_of(loader_of(shard), 0) != epoch_of(loader_of(shard, seed=1), 0)
    assert epoch_of(loader_of(shard), 1) == epoch_of(loader_of(shard, budget=100), 1)


def test_used_indices_are_those_of_the_steps(shard: Shard) -> None:
    loader = loader_of(shard)
    assert loader.used_indices(1) == sorted(loader.step_indices(0).tolist())
    assert loader.used_indices(2) == sorted([*loader.step_indices(0).tolist(), *loader.step_indices(1).tolist()])
    assert loader.used_indices(4) == loader.used_indices(9) == list(range(16))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 700, 10**6])
def test_ranks_share_a_batch(shard: Shard, world_size: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(shard, budget=budget)
    indices = loader.step_indices(1)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    by_rank = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        by_rank.append(loader.micro_batches(indices))
    assert len({len(batches) for batches in by_rank}) == 1
    together = [index for batches in by_rank for members in batches for index in members]
    assert sorted(together) == sorted(indices.tolist())
    for members in (members for batches in by_rank for members in batches):
        tokens = sum(len(shard[index].ids) for index in members)
        assert tokens <= budget or len(members) == 1


def test_length_sorted_batches_hold_every_group_within_the_budget() -> None:
    groups = random_pairs(20)
    batches = length_sorted_batches(groups, 40)
    assert sorted(index for batch in batches for index in batch) == list(range(20))
    lengths = [[len(groups[index].ids) for index in batch] for batch in batches]
    assert all(sum(batch) <= 40 for batch in lengths)
    assert np.concatenate(lengths).tolist() == sorted(np.concatenate(lengths).tolist(), reverse=True)
    assert length_sorted_batches([], 40) == []
