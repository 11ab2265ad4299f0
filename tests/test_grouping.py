"""The order of work: a pinned permutation, and cuts that are partitions within their budget."""

import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.grouping import cut_microbatches, num_batches, plan_batch

TOKENS = st.lists(st.integers(1, 3000), max_size=60)
BUDGETS = st.integers(1, 5000)
WORLDS = st.integers(1, 5)


def cut_for_all(tokens: list[int], budget: int, world_size: int) -> list[list[list[int]]]:
    """One list of micro-batches a rank, for the groups 0..B-1."""
    indices = range(len(tokens))
    return [cut_microbatches(indices, tokens, budget=budget, world_size=world_size, rank=r) for r in range(world_size)]


def epoch_of(num_groups: int, global_batch: int, **of: object) -> list[int]:
    batches = [plan_batch(num_groups, global_batch, k=k, **of) for k in range(num_batches(num_groups, global_batch))]
    return np.concatenate(batches).tolist()


def test_the_order_is_pinned():
    """These orders may never change: a run that resumes under another numpy or release must go on as it began."""
    assert plan_batch(10, 10, seed=42, digest="abc", epoch=0, k=0).tolist() == [2, 6, 9, 3, 0, 7, 5, 1, 4, 8]
    assert plan_batch(10, 10, seed=42, digest="abc", epoch=1, k=0).tolist() == [4, 7, 3, 0, 6, 5, 8, 2, 9, 1]
    assert plan_batch(10, 4, seed=42, digest="abc", epoch=1, k=2).tolist() == [9, 1]


def test_a_fresh_process_with_another_hash_seed_plans_the_same():
    code = (
        "from data_tools.grouping import plan_batch, cut_microbatches as cut\n"
        "print(plan_batch(1000, 7, seed=3, digest='d', epoch=2, k=50).tolist(),"
        " cut(range(9), [5, 7, 7, 1, 30, 2, 9, 9, 4], budget=12, world_size=2, rank=1))"
    )
    run = [sys.executable, "-c", code]
    answers = {subprocess.run(run, env={"PYTHONHASHSEED": s}, capture_output=True, check=True).stdout for s in "12"}
    here = plan_batch(1000, 7, seed=3, digest="d", epoch=2, k=50).tolist()
    cut = cut_microbatches(range(9), [5, 7, 7, 1, 30, 2, 9, 9, 4], budget=12, world_size=2, rank=1)
    assert answers == {f"{here} {cut}\n".encode()}


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_an_epoch_is_a_permutation_whatever_the_batch_size(num_groups, global_batch, seed, epoch):
    of = {"seed": seed, "digest": "d", "epoch": epoch}
    order = epoch_of(num_groups, global_batch, **of)
    assert sorted(order) == list(range(num_groups))
    assert order == epoch_of(num_groups, 1, **of)


def test_the_last_batch_is_short_and_there_is_none_after_it():
    assert num_batches(10, 4) == 3
    assert num_batches(8, 4) == 2
    assert num_batches(0, 4) == 0
    assert [len(plan_batch(10, 4, seed=0, digest="d", epoch=0, k=k)) for k in range(3)] == [4, 4, 2]
    for k in (-1, 3):
        with pytest.raises(ValueError, match=r"is not in 0\.\.2"):
            plan_batch(10, 4, seed=0, digest="d", epoch=0, k=k)


def test_seed_epoch_and_digest_each_give_another_order():
    base = {"seed": 0, "digest": "d", "epoch": 0}
    orders = [tuple(epoch_of(100, 8, **base | change)) for change in ({}, {"seed": 1}, {"epoch": 1}, {"digest": "e"})]
    assert len(set(orders)) == 4


def test_every_place_is_equally_likely():
    """Group 0 falls on each of 5 places in 2,000 epochs: 400 times each, standard deviation 17.9; 5 of them allowed."""
    places = Counter(epoch_of(5, 5, seed=7, digest="d", epoch=e).index(0) for e in range(2000))
    assert all(abs(places[p] - 400) < 90 for p in range(5))


def test_a_caller_that_writes_into_a_batch_does_not_change_the_plan():
    first = plan_batch(10, 10, seed=42, digest="abc", epoch=0, k=0)
    first[:] = 0
    assert plan_batch(10, 10, seed=42, digest="abc", epoch=0, k=0)[:3].tolist() == [2, 6, 9]


def test_a_cut_that_can_be_checked_by_hand():
    """Tokens 9 | 8 | 6 5 | 4 | 3: rank 0 takes 9, 5, 4 (18), rank 1 takes 8, 6, 3 (17). Budget 10 asks for two each:
    rank 0 cuts 9 | 5 4 and rank 1, whose 8 6 is too much for one, 8 | 6 3."""
    tokens = [4, 9, 8, 3, 5, 6]
    assert cut_for_all(tokens, budget=10, world_size=2) == [[[1], [4, 0]], [[2], [5, 3]]]
    assert cut_for_all(tokens, budget=100, world_size=1) == [[[1, 2, 5, 4, 0, 3]]]


def test_the_peak_is_the_mean_and_not_the_budget():
    """Twelve groups of 10 need two micro-batches under 100: 60 + 60, not 100 + 20."""
    assert [len(m) for m in cut_for_all([10] * 12, budget=100, world_size=1)[0]] == [6, 6]


def test_a_group_longer_than_the_budget_stands_alone():
    assert cut_for_all([3, 500, 4], budget=10, world_size=1) == [[[1], [2, 0]]]


def test_a_rank_without_a_group_still_takes_part():
    assert cut_for_all([5, 5], budget=5, world_size=3) == [[[0]], [[1]], [[]]]
    assert cut_for_all([5, 5, 5], budget=5, world_size=2) == [[[0], [2]], [[1], []]]
    assert cut_for_all([], budget=5, world_size=2) == [[], []]


@given(TOKENS, BUDGETS, WORLDS)
@settings(max_examples=120, deadline=None)
def test_cuts_are_a_partition_within_the_budget(tokens, budget, world_size):
    ranks = cut_for_all(tokens, budget, world_size)
    assert sorted(i for rank in ranks for run in rank for i in run) == list(range(len(tokens)))
    assert len({len(rank) for rank in ranks}) == 1
    for rank in ranks:
        assert all(sum(tokens[i] for i in run) <= budget or len(run) == 1 for run in rank)
        filled = [bool(run) for run in rank]
        assert filled == sorted(filled, reverse=True)
        assert all(filled) or all(len(run) <= 1 for run in rank), "an empty micro-batch beside one that could be halved"


@given(TOKENS, BUDGETS, WORLDS)
@settings(max_examples=60, deadline=None)
def test_ranks_differ_by_at_most_the_longest_group(tokens, budget, world_size):
    loads = [sum(tokens[i] for run in rank for i in run) for rank in cut_for_all(tokens, budget, world_size)]
    assert max(loads) - min(loads) <= max(tokens, default=0)


@given(TOKENS, BUDGETS, WORLDS)
@settings(max_examples=60, deadline=None)
def test_like_lengths_sit_together(tokens, budget, world_size):
    for rank in cut_for_all(tokens, budget, world_size):
        lengths = [tokens[i] for run in rank for i in run]
        assert lengths == sorted(lengths, reverse=True)


@given(TOKENS, BUDGETS)
@settings(max_examples=60, deadline=None)
def test_there_are_few_micro_batches(tokens, budget):
    """Two neighbours never fit into one budget, so there are at most 2 x tokens / budget, and one."""
    assert len(cut_for_all(tokens, budget, world_size=1)[0]) <= 2 * sum(tokens) / budget + 1


@given(TOKENS, BUDGETS, WORLDS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_arrival_does_not_matter(tokens, budget, world_size, rng: random.Random):
    indices = list(range(100, 100 + len(tokens)))
    shuffled = rng.sample(indices, len(indices))
    for rank in range(world_size):
        of = {"budget": budget, "world_size": world_size, "rank": rank}
        again = cut_microbatches(np.array(shuffled, dtype=np.int64), [tokens[i - 100] for i in shuffled], **of)
        assert again == cut_microbatches(indices, np.array(tokens, dtype=np.int64), **of)


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"rank": 2}, {"rank": -1}, {"world_size": 0}])
def test_impossible_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="must be >= 1"):
        cut_microbatches([0], [5], **{"budget": 5, "world_size": 2, "rank": 0} | wrong)
    with pytest.raises(ValueError, match="1 indices, but 2"):
        cut_microbatches([0], [5, 6], budget=5, world_size=1, rank=0)
