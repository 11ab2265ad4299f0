"""From the samples of one item to its answer: majority with a threshold, ties, abstention; and negative marking.

Pure functions. An answer of None is one that could not be read; it has no vote, and it counts in no other way here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Ties = Literal["abstain", "first"]
Outcome = Literal["correct", "wrong", "abstained", "invalid"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "abstained", "invalid")


@dataclass(frozen=True, slots=True)
class Vote:
    """answer: the winner, None where there is none. votes: of every answer, most first. tied: for the first place."""

    answer: str | None
    votes: dict[str, int]
    tied: bool


def majority_vote(answers: Sequence[str | None], *, threshold: int = 1, ties: Ties = "abstain") -> Vote:
    """The answer with the most votes, if it has at least `threshold` of them.

    ties: where several answers share the most votes, "abstain" gives none of them, "first" the one drawn first.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    ranked = dict(sorted(votes.items(), key=lambda item: -item[1]))  # stable: of equals the one drawn first
    most = max(ranked.values(), default=0)
    leaders = [answer for answer, count in ranked.items() if count == most]
    tied = len(leaders) > 1
    wins = most >= threshold and most > 0 and (not tied or ties == "first")
    return Vote(leaders[0] if wins else None, ranked, tied)


def negative_marking(correct: int, wrong: int, items: int, *, penalty: float) -> float:
    """(correct - penalty x wrong) / items: no answer costs nothing, a wrong one `penalty`.

    With penalty 1 / (options - 1) guessing gains nothing on average. Source: the marking of entrance exams.
    """
    if min(correct, wrong) < 0 or correct + wrong > items or items < 1:
        raise ValueError(f"{correct=} and {wrong=} do not fit {items=}")
    return (correct - penalty * wrong) / items
