"""How well scores of steps tell right steps from wrong ones, with intervals. Pure functions of numbers.

Steps of one question are not independent: intervals come from drawing questions, not steps, with replacement. Accuracy
takes a step for right above 0.5. Balanced accuracy is the mean of that of right and of wrong steps: 0.5 for a model
that always says the same. AUC asks for no threshold: the chance that a right step scores higher than a wrong one.

Letters: N steps of all questions, R drawings, M measures.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
SEED = 0
MEASURES = ("step_accuracy", "step_accuracy_right", "step_accuracy_wrong", "step_balanced_accuracy", "step_auc")


def numbers(scores: Sequence[np.ndarray], hard: Sequence[np.ndarray]) -> dict[str, Any]:
    """Of one model. scores, hard: a question's steps each, (n,) probabilities and 0 or 1 labels. A number that is not
    defined (there is no wrong step) is None."""
    flat = np.concatenate(hard)
    found = {"questions": len(hard), "steps": len(flat), "right": float(flat.mean())}
    return found | _intervals(measures(np.concatenate(scores), flat), _drawn(scores, hard))


def differences(
    scores: Sequence[np.ndarray], control: Sequence[np.ndarray], hard: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Model less control, on the same drawings of questions; an interval that excludes 0 tells them apart."""
    flat = np.concatenate(hard)
    value = measures(np.concatenate(scores), flat) - measures(np.concatenate(control), flat)
    return _intervals(value, _drawn(scores, hard) - _drawn(control, hard))


def measures(scores: np.ndarray, hard: np.ndarray) -> np.ndarray:
    """(M,) of (N,) scores and labels; NaN where one is not defined. AUC by ranks, ties in the middle (Mann and Whitney
    1947)."""
    right, said = hard == 1, scores > 0.5
    positive, negative = int(right.sum()), int((~right).sum())
    of_right = said[right].mean() if positive else np.nan
    of_wrong = (~said[~right]).mean() if negative else np.nan
    auc = np.nan
    if positive and negative:
        _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
        middle = np.cumsum(count) - (count - 1) / 2  # the mean rank of each distinct score, from 1
        auc = (middle[place][right].sum() - positive * (positive + 1) / 2) / (positive * negative)
    return np.array([(said == right).mean(), of_right, of_wrong, (of_right + of_wrong) / 2, auc])


def _drawn(scores: Sequence[np.ndarray], hard: Sequence[np.ndarray]) -> np.ndarray:
    """(R, M) over drawn questions, always the same ones."""
    generator = np.random.Generator(np.random.Philox(key=SEED))
    found = []
    for _ in range(RESAMPLES):
        rows = generator.integers(0, len(hard), len(hard))
        found.append(measures(np.concatenate([scores[k] for k in rows]), np.concatenate([hard[k] for k in rows])))
    return np.array(found)


def _intervals(value_M: np.ndarray, drawn_RM: np.ndarray) -> dict[str, dict[str, float] | None]:
    """Values and their 95% intervals (percentile bootstrap, Efron 1979)."""
    found: dict[str, dict[str, float] | None] = {}
    for name, value, drawn in zip(MEASURES, value_M.tolist(), drawn_RM.T, strict=True):
        known = drawn[~np.isnan(drawn)]
        found[name] = None
        if not np.isnan(value):
            low, high = np.quantile(known, [0.025, 0.975]).tolist()
            found[name] = {"value": value, "low": low, "high": high}
    return found
