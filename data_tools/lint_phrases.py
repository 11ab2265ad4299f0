"""Runs of one to three words that one side of the pairs has and the other has not, and how texts close.

Words are `\\w+` in lower case, numbers as "#"; Chinese, Japanese and Thai count by characters. A text's beginning is
a word too, so that an opening is a phrase. Marks are left to the features of punctuation. Which phrases are looked at
is chosen among training pairs only, fold by fold (`choose`), so that a held-out score owes nothing to held-out pairs.

Letters: P pairs, E entries (a phrase that only one side of a pair holds), K phrases chosen.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.overlap import SPACELESS

WORD = re.compile(rf"{SPACELESS.pattern}|[^\W{SPACELESS.pattern[1:-1]}]+")
DIGITS = re.compile(r"\d+")
START = "<start>"
BITS = 21
"""A word's number takes so many bits: three of them are one int64."""
HEAD, TAIL = 300, 100
"""Words looked at from a long text's beginning and end."""
LEAST_PAIRS = 4
"""A phrase in fewer pairs tells nothing about others."""


@dataclass(frozen=True, slots=True)
class Phrases:
    """Which pairs hold which phrase on one side only.

    pair, phrase, sign: (E,) the pair's index, the phrase's, +1 where chosen has it and -1 where rejected has it.
    texts: the phrases. in_chosen, in_rejected: number of pairs whose side holds each phrase, on both sides or one.
    """

    pair: np.ndarray
    phrase: np.ndarray
    sign: np.ndarray
    texts: Sequence[str]
    in_chosen: np.ndarray
    in_rejected: np.ndarray

    def choose(self, of: np.ndarray, most: int) -> np.ndarray:
        """(K,) phrases that best tell the sides of the pairs of the mask `of` (P,), best first; at most `most`.

        By the number of pairs in which one side alone has it: |a - b| / sqrt(a + b) (McNemar's statistic).
        """
        strength = self.strength(of)
        order = np.argsort(-np.abs(strength), kind="stable")[:most]
        return order[np.abs(strength[order]) > 0]

    def strength(self, of: np.ndarray) -> np.ndarray:
        """McNemar's statistic with its sign, (phrases,); 0 for one that fewer than LEAST_PAIRS pairs show."""
        kept = of[self.pair]
        size = len(self.texts)
        balance = np.bincount(self.phrase[kept], weights=self.sign[kept], minlength=size)
        shown = np.bincount(self.phrase[kept], minlength=size)
        return np.where(shown >= LEAST_PAIRS, balance / np.sqrt(np.maximum(shown, 1)), 0.0)

    def columns(self, chosen: np.ndarray, pairs: int) -> np.ndarray:
        """(P, K) of +1, 0, -1: which side alone of each pair has each of the phrases `chosen` (K,)."""
        place = np.full(len(self.texts), -1)
        place[chosen] = np.arange(len(chosen))
        kept = place[self.phrase] >= 0
        out = np.zeros((pairs, len(chosen)))
        out[self.pair[kept], place[self.phrase[kept]]] = self.sign[kept]
        return out


def find_phrases(chosen: Sequence[str], rejected: Sequence[str]) -> Phrases:
    """Phrases anywhere in the texts of P pairs."""
    vocabulary: dict[str, int] = {}
    sides = [[_runs(_numbers(text, vocabulary)) for text in texts] for texts in (chosen, rejected)]
    return _collect(sides[0], sides[1], list(vocabulary))


def find_closings(chosen: Sequence[str], rejected: Sequence[str]) -> Phrases:
    """The last word, the last two and the last three of the texts of P pairs."""
    vocabulary: dict[str, int] = {}
    sides = [[_last_runs(_numbers(text[-400:], vocabulary)) for text in texts] for texts in (chosen, rejected)]
    return _collect(sides[0], sides[1], list(vocabulary))


def _numbers(text: str, vocabulary: dict[str, int]) -> np.ndarray:
    """The words as numbers from 1, with the beginning's before them."""
    words = WORD.findall(DIGITS.sub(" 0 ", text.casefold()))
    if len(words) > HEAD + TAIL:
        words = [*words[:HEAD], *words[-TAIL:]]
    top = (1 << BITS) - 1  # words beyond that many share one number
    return np.array(
        [min(top, vocabulary.setdefault(word, len(vocabulary) + 1)) for word in (START, *words)], dtype=np.int64
    )


def _runs(ids: np.ndarray) -> np.ndarray:
    """All runs of one to three words as one number each, once."""
    two = (ids[:-1] << BITS) | ids[1:]
    three = (two[:-1] << BITS) | ids[2:]
    return np.unique(np.concatenate((ids[1:], two, three)))  # the beginning alone is in every text


def _last_runs(ids: np.ndarray) -> np.ndarray:
    runs, number = [], 0
    for count, word in enumerate(ids[:0:-1].tolist()[:3]):
        number |= word << (BITS * count)
        runs.append(number)
    return np.array(runs, dtype=np.int64)


def _collect(chosen: Sequence[np.ndarray], rejected: Sequence[np.ndarray], words: Sequence[str]) -> Phrases:
    pairs = np.arange(len(chosen))
    of = [np.repeat(pairs, [len(runs) for runs in side]) for side in (chosen, rejected)]
    runs = [np.concatenate([*side, np.zeros(0, dtype=np.int64)]) for side in (chosen, rejected)]
    all_runs, counts = np.unique(np.concatenate(runs), return_counts=True)
    known = all_runs[counts >= LEAST_PAIRS]
    if not len(known):
        none = np.zeros(0, dtype=np.int64)
        return Phrases(none, none, none, [], none, none)
    keys, held = [], []
    for side, own in zip(of, runs, strict=True):
        index = np.searchsorted(known, own)
        kept = known[np.minimum(index, len(known) - 1)] == own
        held.append(np.bincount(index[kept], minlength=len(known)))
        keys.append(side[kept].astype(np.int64) * len(known) + index[kept])
    only = [np.setdiff1d(keys[0], keys[1], assume_unique=True), np.setdiff1d(keys[1], keys[0], assume_unique=True)]
    entry = np.concatenate(only)
    sign = np.repeat([1.0, -1.0], [len(own) for own in only])
    texts = [_text(run, words) for run in known.tolist()]
    return Phrases(entry // len(known), entry % len(known), sign, texts, held[0], held[1])


def _text(run: int, words: Sequence[str]) -> str:
    found = []
    while run:
        found.append(words[(run & ((1 << BITS) - 1)) - 1])
        run >>= BITS
    joint = "" if all(SPACELESS.match(word) for word in found) else " "
    return joint.join("#" if word == "0" else word for word in reversed(found))
