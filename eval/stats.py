"""The numbers of an evaluation, as pure functions of counts and lists: shares, intervals, tests, averages.

They know no model, task or file. Votes over samples are in eval.vote. Random draws take a seed and nothing else.
Letters: N items, n samples of an item, c right ones among them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959964
"""Two-sided 95% quantile of the normal distribution."""
RESAMPLES = 10_000
CHUNK = 1 << 22
"""So many drawn indices are held at a time: 32 MiB."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927); 0..1. All of 0..1 where nothing was tried."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes=} must be from 0 to {trials=}")
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value that two runs are equally often right, from the items that one alone got right.

    Exact (binomial, 1/2): twice the smaller tail, at most 1; 1 where there is no such item (McNemar 1947).
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"{only_a=} and {only_b=} must be 0 or more")
    total, fewer = only_a + only_b, min(only_a, only_b)
    tail = term = 1  # whole numbers, C(total, k) one after another: exact at any size
    for k in range(fewer):
        term = term * (total - k) // (k + 1)
        tail += term
    return 1.0 if 2 * tail >= 1 << total else 2 * tail / (1 << total)


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """mean(b) - mean(a) over the same N items, with the 2.5% and 97.5% quantiles over resampled items.

    weights: of the items; a mean is then sum(value) / sum(weight) over the drawn items, as for nats a token, where the
    values are sums over an item. Percentile bootstrap (Efron 1979). Raises ValueError for lists of other lengths.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"two lists of one length, at least 1, are needed, got {len(a)} and {len(b)}")
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    weight = np.ones(len(a)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(weight) != len(a):
        raise ValueError(f"{len(weight)} weights for {len(a)} items")
    drawn = _resampled(difference, weight, seed, resamples)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(difference.sum() / weight.sum()), float(low), float(high))


def bootstrap_mean(
    values: Sequence[float], *, weights: Sequence[float] | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Mean of N values (sum(value) / sum(weight) with weights) and its 95% interval over resampled items."""
    zeros = [0.0] * len(values)
    return paired_bootstrap(zeros, values, weights=weights, seed=seed, resamples=resamples)


def cohen_kappa(a: Sequence[str], b: Sequence[str]) -> float:
    """Agreement of two judges beyond chance: (po - pe) / (1 - pe) (Cohen 1960); 1 where both only ever say one."""
    if len(a) != len(b) or not a:
        raise ValueError(f"two lists of one length, at least 1, are needed, got {len(a)} and {len(b)}")
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    expected = sum(a.count(name) * b.count(name) for name in set(a)) / len(a) ** 2
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k samples drawn from n, c of them right, is right: 1 - C(n-c, k) / C(n, k).

    Unbiased (Chen et al. 2021, arXiv 2107.03374, eq. 1). Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"{n=}, {c=}, {k=}: 0 <= c <= n and 1 <= k <= n must hold")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def micro_average(sums_and_counts: Mapping[str, tuple[float, int]]) -> float:
    """Every item weighs the same: all subjects' sums over all their counts."""
    return sum(total for total, _ in sums_and_counts.values()) / sum(count for _, count in sums_and_counts.values())


def macro_average(sums_and_counts: Mapping[str, tuple[float, int]]) -> float:
    """Every subject weighs the same: the mean of the subjects' means."""
    return sum(total / count for total, count in sums_and_counts.values()) / len(sums_and_counts)


def macro_wilson(right: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
    """95% interval of the macro average of shares, from (successes, trials) by subject.

    Wilson's intervals joined by their squares (MOVER: Zou & Donner 2008): sqrt(sum (p - low)^2) / S below the average,
    the same above it. A bootstrap would say that nothing can vary where a small subject has all or none right.
    """
    average = macro_average(right)
    below = above = 0.0
    for successes, trials in right.values():
        low, high = wilson_interval(successes, trials)
        below += (successes / trials - low) ** 2
        above += (high - successes / trials) ** 2
    return average - math.sqrt(below) / len(right), average + math.sqrt(above) / len(right)


def macro_interval(
    values: Mapping[str, Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95% interval of the macro average; items are drawn anew within each subject, subjects are kept."""
    total = np.zeros(resamples)
    for number, (_, own) in enumerate(sorted(values.items())):
        mine = np.asarray(own, dtype=np.float64)
        total += _resampled(mine, np.ones(len(mine)), seed + number, resamples)
    low, high = np.quantile(total / len(values), [0.025, 0.975])
    return float(low), float(high)


def _resampled(values: np.ndarray, weights: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """(resamples,) sum(values) / sum(weights) over N items drawn with replacement; in pieces, to bound memory."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    rows = max(1, CHUNK // len(values))
    found = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, len(values), (min(rows, resamples - start), len(values)))
        found.append(values[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    return np.concatenate(found)
