"""Numbers of an evaluation against values worked out by hand: intervals, tests, pass@k, votes, averages."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from eval.stats import (
    bootstrap_mean,
    macro_average,
    macro_interval,
    macro_wilson,
    mcnemar_exact,
    micro_average,
    paired_bootstrap,
    pass_at_k,
    wilson_interval,
)
from eval.vote import majority_vote, negative_marking


def test_wilson_of_nothing_and_of_nonsense() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes=3"):
        wilson_interval(3, 2)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (0, 5, 2 / 32),  # 2 x C(5,0) / 2^5
        (1, 9, 2 * (1 + 10) / 1024),
        (5, 2, 2 * (1 + 7 + 21) / 128),
        (3, 4, 1.0),  # 2 x (1 + 7 + 21 + 35) / 128
    ],
)
def test_mcnemar(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar_exact(only_a, only_b) == mcnemar_exact(only_b, only_a) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many_items_is_exact() -> None:
    """At 10,000 items a sum of floats would be 0 or inf; near the middle the normal distribution with the continuity
    correction is right to 1e-3."""
    p = mcnemar_exact(4900, 5100)
    assert p == pytest.approx(math.erfc((200 - 1) / math.sqrt(10_000) / math.sqrt(2)), abs=1e-3)


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 2), (5, 5), (7, 3), (1, 1)])
def test_pass_at_k_is_the_share_of_all_draws(n: int, c: int) -> None:
    """Counted over every set of k samples out of n."""
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_against_the_other_closed_form() -> None:
    """1 - prod (1 - k / i) for i in n - c + 1 .. n, with fractions; 200 samples."""
    for c, k in itertools.product((0, 1, 7, 100, 199, 200), (1, 2, 10, 100, 200)):
        product = Fraction(1)
        for i in range(200 - c + 1, 201):
            product *= 1 - Fraction(k, i)
        expected = 1 - product if 200 - c >= k else Fraction(1)
        assert pass_at_k(200, c, k) == pytest.approx(float(expected), abs=1e-12)
    with pytest.raises(ValueError, match="k=6"):
        pass_at_k(5, 1, 6)


def test_bootstrap_is_repeatable_and_near_the_normal_one() -> None:
    """With 400 items a percentile interval is the mean +- 1.96 standard errors to a few percent."""
    generator = np.random.default_rng(1)
    a, b = generator.random(400), generator.random(400) + 0.1
    found = paired_bootstrap(list(a), list(b), seed=3)
    assert found == paired_bootstrap(list(a), list(b), seed=3)
    assert found != paired_bootstrap(list(a), list(b), seed=4)
    error = (b - a).std() / 20
    assert found.value == pytest.approx((b - a).mean(), abs=1e-12)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error)


def test_bootstrap_of_two_items_has_three_outcomes() -> None:
    """Differences 0 and 1: means 0, 1/2, 1 with chances 1/4, 1/2, 1/4, so the ends of 95% are 0 and 1."""
    found = paired_bootstrap([0, 0], [0, 1])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    same = paired_bootstrap([1, 0, 1], [1, 0, 1])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_weighted_bootstrap_is_a_ratio_of_sums() -> None:
    """Nats of 10 and 60 over 5 and 15 tokens: 70 / 20, not the mean of 2 and 4."""
    found = bootstrap_mean([10, 60], weights=[5, 15])
    assert (found.value, found.low, found.high) == (3.5, 2.0, 4.0)
    with pytest.raises(ValueError, match="1 weights for 2 items"):
        bootstrap_mean([1, 2], weights=[1])


def test_averages() -> None:
    """8 of 10 and 1 of 2: 9 / 12 by items, (0.8 + 0.5) / 2 by subjects."""
    by_subject = {"a": (8, 10), "b": (1, 2)}
    assert micro_average(by_subject) == pytest.approx(0.75)
    assert macro_average(by_subject) == pytest.approx(0.65)
    low, high = macro_interval({"a": [1] * 8 + [0] * 2, "b": [1, 0]}, seed=0)
    assert low < 0.65 < high and (low, high) == macro_interval({"b": [1, 0], "a": [1] * 8 + [0] * 2}, seed=0)


def test_macro_of_wilson_intervals() -> None:
    """One subject: Wilson's own. Four alike: as narrow as the root of four. None right anywhere: still an interval."""
    assert macro_wilson({"a": (8, 10)}) == pytest.approx(wilson_interval(8, 10))
    low, high = wilson_interval(8, 10)
    assert macro_wilson(dict.fromkeys("abcd", (8, 10))) == pytest.approx(
        (0.8 - (0.8 - low) / 2, 0.8 + (high - 0.8) / 2)
    )
    assert macro_wilson({"a": (0, 1), "b": (0, 2)})[1] == pytest.approx(math.hypot(0.793456, 0.657620) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("answers", "threshold", "ties", "answer", "tied"),
    [
        (["A", "B", "A", None, "A"], 3, "abstain", "A", False),
        (["A", "B", "A", None, "C"], 3, "abstain", None, False),
        (["A", "B", "A", None, "C"], 1, "abstain", "A", False),
        (["B", "A", "A", "B", None], 1, "abstain", None, True),
        (["B", "A", "A", "B", None], 1, "first", "B", True),
        (["B", "A", "A", "B", None], 3, "first", None, True),
        ([None, None], 1, "first", None, False),
        ([], 1, "abstain", None, False),
    ],
)
def test_majority(answers: list[str | None], threshold: int, ties: str, answer: str | None, tied: bool) -> None:
    vote = majority_vote(answers, threshold=threshold, ties=ties)  # type: ignore[arg-type]
    assert (vote.answer, vote.tied) == (answer, tied)
    assert sum(vote.votes.values()) == len([each for each in answers if each])


def test_negative_marking() -> None:
    """Of 10 items 5 right, 3 wrong, 2 open, a third off for each wrong one: (5 - 1) / 10."""
    assert negative_marking(5, 3, 10, penalty=1 / 3) == pytest.approx(0.4)
    assert negative_marking(5, 3, 10, penalty=0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="items=7"):
        negative_marking(5, 3, 7, penalty=1)
