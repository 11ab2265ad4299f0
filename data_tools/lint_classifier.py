"""How well can a tiny classifier tell chosen from rejected by surface features alone, on pairs it has not seen?

A logistic regression on the difference of the two texts' features (Bradley-Terry: what a preference loss fits), no
intercept, ridge 1, columns divided by their standard deviation in the training texts. Five folds, split by groups:
pairs of one prompt or question are all in the same fold. Its score is the AUC within pairs: the share of held-out pairs
whose chosen text gets the higher score, ties counting half; 0.5 is chance.

The interval (95%) is Wilson's (1927) for a share, at the number of pairs divided by the design effect of the groups
(Kish 1965), where that is above 1: many pairs of few prompts count as less. It stays honest at a share of 1.

Letters: P pairs, F features, G groups of pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.lint_features import GROUPS, measure, names_of, without_end_tokens
from data_tools.lint_phrases import Phrases, find_closings, find_phrases

FOLDS = 5
RIDGE = 1.0
MOST_PHRASES = 60
CLIP = 5.0
"""A text lies at most so many standard deviations from the mean: one odd text must not decide."""
Z95 = 1.959964


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """What one group of features can tell. auc: within pairs, held out; low, high: its interval.

    auc_texts: how often a chosen text of any held-out pair gets a higher score than a rejected one of any, in its fold.
    scores: (P,) of the held-out pairs, chosen minus rejected, in standard units of no meaning of their own.
    cues: what tells most, strongest first. pairs: P; prompts: groups that folds were made of.
    """

    group: str
    auc: float
    low: float
    high: float
    auc_texts: float
    pairs: int
    prompts: int
    scores: np.ndarray
    cues: Sequence["Cue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cue:
    """One feature over all pairs: share of pairs in which chosen has more of it, less, and the sides' means."""

    name: str
    more: float
    less: float
    chosen: float
    rejected: float

    @property
    def auc(self) -> float:
        """Within pairs, by this alone; the side that has more of it does not matter."""
        return 0.5 + abs(self.more - self.less) / 2


def separations(
    chosen: Sequence[str],
    rejected: Sequence[str],
    groups: Sequence[int],
    *,
    seed: int,
    left_out: Sequence[str] = (),
    only: str | None = None,
) -> list[Separation]:
    """One result for each group of features, and "all" for those together that are not in left_out, if there are any.

    only: the name of the one result that is wanted. groups: (P,) numbers; pairs of equal number are never on both sides
    of a split. Needs two groups or more.
    """
    features = _Features(chosen, rejected)
    folds = _folds(groups, seed)
    together = [group for group in GROUPS if group not in left_out]
    sets = {group: [group] for group in GROUPS} | ({"all": together} if together else {})
    return [
        _separation(name, parts, features, groups, folds)
        for name, parts in sets.items()
        if only is None or name == only
    ]


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval of a share of `count` draws (Wilson 1927); count above 0."""
    centre = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(max(0.0, share * (1 - share)) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def interval(wins: np.ndarray, groups: Sequence[int]) -> tuple[float, float]:
    """Of the mean of wins (P,) in 0, 0.5, 1, with the pairs of a group counted as related."""
    share = float(wins.mean())
    _, place = np.unique(groups, return_inverse=True)
    off = np.bincount(place, weights=wins - share)
    plain = float(((wins - share) ** 2).sum())
    effect = max(1.0, float((off**2).sum()) / plain) if plain > 0 else len(wins) / len(off)
    return wilson(share, len(wins) / effect)


def fit(difference: np.ndarray, *, ridge: float = RIDGE) -> np.ndarray:
    """Weights (F,) that minimise sum log(1 + exp(-d w)) + ridge/2 |w|^2 over differences d (P, F), by Newton steps."""
    weights = np.zeros(difference.shape[1])
    for _ in range(30):
        miss = 1 / (1 + np.exp(np.clip(difference @ weights, -30, 30)))
        gradient = ridge * weights - difference.T @ miss
        curve = (difference * (miss * (1 - miss))[:, None]).T @ difference
        curve[np.diag_indices_from(curve)] += ridge
        step = np.linalg.solve(curve, gradient)
        weights -= step
        if np.abs(step).max(initial=0.0) < 1e-4:
            break
    return weights


class _Features:
    """Numbers of both sides' texts, and the phrases that are chosen anew for every fold."""

    def __init__(self, chosen: Sequence[str], rejected: Sequence[str]) -> None:
        self.pairs = len(chosen)
        measured = measure(chosen), measure(rejected)
        chosen, rejected = list(map(without_end_tokens, chosen)), list(map(without_end_tokens, rejected))
        self.values: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for group in measured[0]:
            (left, counts), (right, other_counts) = (side[group] for side in measured)
            # As many of something are equal, though the lengths differ: both get the mean of the two shares.
            middle = np.where(counts == other_counts, (left + right) / 2, np.nan)
            self.values[group] = tuple(np.where(np.isnan(middle), own, middle) for own in (left, right))  # type: ignore[assignment]
        self.words: dict[str, tuple[Phrases, str]] = {
            "phrase": (find_phrases(chosen, rejected), "the words"),
            "ending": (find_closings(chosen, rejected), "the last words"),
        }

    def sides(self, group: str) -> tuple[np.ndarray, np.ndarray]:
        """(P, F) of chosen and of rejected; no columns for `phrase`."""
        if group not in self.values:
            return np.zeros((self.pairs, 0)), np.zeros((self.pairs, 0))
        pair = self.values[group]
        if group != "length":
            return pair
        # A text that keeps to one length is told by the square, around the middle of both sides.
        middle = np.median(np.concatenate([own[:, 0] for own in pair]))
        left, right = (np.hstack((own, (own[:, :1] - middle) ** 2)) for own in pair)
        return left, right

    def fold(self, parts: Sequence[str], train: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Differences (P, F) in standard units of the training pairs, and the two sides' numbers in the same units.

        A phrase's two sides are +1 and 0, or 0 and +1: both or neither makes no difference.
        """
        left, right = [], []
        for group in parts:
            chosen, rejected = self.sides(group)
            left.append(chosen)
            right.append(rejected)
            if group in self.words:
                phrases, _ = self.words[group]
                columns = phrases.columns(phrases.choose(train, MOST_PHRASES), self.pairs)
                left.append(np.maximum(columns, 0))
                right.append(np.maximum(-columns, 0))
        chosen, rejected = np.hstack(left), np.hstack(right)
        texts = np.concatenate((chosen[train], rejected[train]))
        spread, mean = texts.std(axis=0), texts.mean(axis=0)
        used = spread > 1e-9  # what never varies in training says nothing; in held-out texts it may
        units = [np.clip((side[:, used] - mean[used]) / spread[used], -CLIP, CLIP) for side in (chosen, rejected)]
        return units[0] - units[1], units[0], units[1]

    def cues(self, parts: Sequence[str], most: int = 5) -> list[Cue]:
        """The features that tell most by themselves over all pairs."""
        found = [cue for group in parts for cue in (*self._number_cues(group), *self._word_cues(group, most))]
        return sorted((cue for cue in found if cue.auc > 0.5), key=lambda cue: -cue.auc)[:most]

    def _number_cues(self, group: str) -> list[Cue]:
        if group not in self.values:
            return []
        chosen, rejected = self.values[group]
        more, less = (chosen > rejected).mean(axis=0), (chosen < rejected).mean(axis=0)
        means = zip(chosen.mean(axis=0).tolist(), rejected.mean(axis=0).tolist(), strict=True)
        return [
            Cue(name=name, more=up, less=down, chosen=left, rejected=right)
            for name, up, down, (left, right) in zip(names_of(group), more.tolist(), less.tolist(), means, strict=True)
        ]

    def _word_cues(self, group: str, most: int) -> list[Cue]:
        if group not in self.words:
            return []
        phrases, kind = self.words[group]
        everywhere = np.ones(self.pairs, dtype=bool)
        cues: list[Cue] = []
        for index in phrases.choose(everywhere, most * 3).tolist():
            signs = phrases.sign[phrases.phrase == index]
            cue = Cue(
                name=f'{kind} "{phrases.texts[index]}"',
                more=float((signs > 0).sum()) / self.pairs,
                less=float((signs < 0).sum()) / self.pairs,
                chosen=float(phrases.in_chosen[index]) / self.pairs,
                rejected=float(phrases.in_rejected[index]) / self.pairs,
            )
            cues.append(cue)
        # Of a phrase and its parts that tell as much, the whole.
        whole = {(cue.more, cue.less): cue for cue in sorted(cues, key=lambda cue: len(cue.name))}
        return list(whole.values())


def _separation(
    name: str, parts: Sequence[str], features: _Features, groups: Sequence[int], folds: np.ndarray
) -> Separation:
    scores = np.zeros(features.pairs)
    texts: list[tuple[float, int]] = []
    for fold in range(FOLDS):
        held = folds == fold
        if not held.any() or held.all():
            continue
        difference, chosen, rejected = features.fold(parts, ~held)
        weights = fit(difference[~held])
        scores[held] = difference[held] @ weights
        texts.append((_auc(chosen[held] @ weights, rejected[held] @ weights), int(held.sum())))
    # Rounding must not break ties: two texts of equal features have no winner.
    wins = np.where(np.abs(scores) < 1e-9, 0.5, (scores > 0).astype(float))
    low, high = interval(wins, groups)
    return Separation(
        group=name,
        auc=float(wins.mean()),
        low=low,
        high=high,
        auc_texts=sum(area * count for area, count in texts) / max(1, sum(count for _, count in texts)),
        pairs=features.pairs,
        prompts=len(set(groups)),
        scores=scores,
        cues=features.cues(parts),
    )


def _auc(chosen: np.ndarray, rejected: np.ndarray) -> float:
    ordered = np.sort(rejected)
    ranks = np.searchsorted(ordered, chosen, "left") + np.searchsorted(ordered, chosen, "right")
    return float(ranks.mean() / 2 / len(ordered))


def _folds(groups: Sequence[int], seed: int) -> np.ndarray:
    """A fold for each pair: groups in a seeded order, each into the fold that has the fewest pairs."""
    values, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    sizes, of_group = np.zeros(FOLDS, dtype=int), np.zeros(len(values), dtype=int)
    for group in np.random.default_rng(seed).permutation(len(values)):
        of_group[group] = sizes.argmin()
        sizes[of_group[group]] += counts[group]
    return of_group[place]
