"""The lint's classifier: values worked by hand, agreement with scikit-learn, and nothing where there is nothing."""

import math
import random

import numpy as np
import pytest

from data_tools.lint_classifier import FOLDS, _folds, fit, interval, separations, wilson
from data_tools.lint_features import GROUPS, MEASURES, measure
from data_tools.lint_phrases import find_closings, find_phrases

WORDS = "the patient walks home after lunch and reads about small rivers in old towns near green hills".split()


def plain_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 30))).capitalize() + "." for _ in range(count)]


def value(text: str, group: str, name: str) -> float:
    return float(measure([text])[group][0][0, MEASURES[group][1].index(name)])


def test_wilson_by_hand() -> None:
    """10 of 10: n / (n + z^2) = 10 / 13.8415; 5 of 10: 0.5 -+ half of sqrt(z^2 / (n + z^2))."""
    assert wilson(1.0, 10) == pytest.approx((10 / (10 + 1.959964**2), 1.0))
    half = math.sqrt(1.959964**2 / (10 + 1.959964**2)) / 2
    assert wilson(0.5, 10) == pytest.approx((0.5 - half, 0.5 + half))


def test_pairs_of_one_prompt_count_as_related() -> None:
    """40 pairs, 8 won of each 10: as 40 draws where they are free, as 4 where every prompt's ten agree."""
    wins = np.array(([1.0] * 8 + [0.0] * 2) * 4)
    assert interval(wins, list(range(40))) == pytest.approx(wilson(0.8, 40))
    agree = np.array([1.0] * 30 + [0.0] * 10)
    low, high = interval(agree, [i // 10 for i in range(40)])
    assert (low, high) == pytest.approx(wilson(0.75, 4))
    assert interval(np.ones(40), [i // 10 for i in range(40)]) == pytest.approx(wilson(1.0, 4))


def test_the_fit_is_logistic_regression() -> None:
    """Against scikit-learn on (d, 1) and (-d, 0): twice every pair, so half of the ridge's weight there."""
    linear = pytest.importorskip("sklearn.linear_model")
    difference = np.random.default_rng(0).normal(size=(80, 3)) + [0.5, -0.2, 0.0]
    data, label = np.concatenate((difference, -difference)), np.repeat([1, 0], 80)
    model = linear.LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10).fit(data, label)
    np.testing.assert_allclose(fit(difference, ridge=1.0), model.coef_[0], rtol=1e-4)  # both stop at small steps


def test_a_prompt_is_never_on_both_sides() -> None:
    groups = [number // 3 for number in range(100)]
    folds = _folds(groups, 0)
    assert all(len({folds[i] for i in range(100) if groups[i] == group}) == 1 for group in set(groups))
    sizes = np.bincount(folds, minlength=FOLDS)
    assert sizes.sum() == 100 and sizes.min() >= 18  # groups of 3 or less over 5 folds
    assert (folds != _folds(groups, 1)).any() and (folds == _folds(groups, 0)).all()


def test_memorised_prompts_do_not_help() -> None:
    """Ten chosen texts of each prompt share a word that no other prompt has: known by row, chance by prompt."""
    texts = plain_texts(400, 3)
    marks = ["".join(random.Random(i).choices("abcdefgh", k=8)) for i in range(20)]
    chosen = [f"{texts[i]} {marks[i // 10]}" for i in range(200)]
    rejected = texts[200:]
    by_prompt = separations(chosen, rejected, [i // 10 for i in range(200)], seed=0, only="phrase")[0]
    by_row = separations(chosen, rejected, list(range(200)), seed=0, only="phrase")[0]
    assert by_row.auc > 0.95 and by_prompt.auc < 0.65 and by_prompt.prompts == 20


def test_texts_of_one_distribution_are_not_told_apart() -> None:
    found = separations(plain_texts(400, 1), plain_texts(400, 2), list(range(400)), seed=0)
    assert [own.group for own in found] == [*GROUPS, "all"]
    assert all(own.low < 0.5 < own.high + 0.02 for own in found), [(own.group, own.low, own.high) for own in found]


@pytest.mark.parametrize(
    ("text", "group", "name", "expected"),
    [
        ("Abc DEF. ghi", "case", "upper-case letters for each letter", 4 / 9),
        ("Abc DEF. ghi", "case", "lower-case beginnings of sentences", 1 / 2),
        ("abc", "case", "an upper-case first letter", -1.0),
        ("سلام", "case", "upper-case letters for each letter", 0.0),
        ("a, b، c，", "punctuation", "commas for each character", 3 / 8),
        ("دارو ab", "language", "letters that are ARABIC", 4 / 6),
        ("发热abc", "language", "letters that are CJK", 2 / 5),
        ("۱۲ 34", "language", "digits that are not ASCII", 1 / 2),
        ("- a\n- b", "format", "bullets for each character", 2 / 7),
        ("۱. الف", "format", "numbered lines for each character", 1 / 6),
        (r"\frac{1}{2}", "format", "LaTeX commands for each character", 1 / 11),
        ('{"answer": 1}', "format", "JSON keys for each character", 1 / 13),
        ("so it is (b), not C", "answer", "C as the last letter named", 1.0),
        ("so it is 20", "answer", "a last number that ends in 0", 1.0),
        ("It is so.</s>", "ending", "an end token as text at the end", 1.0),
        ("It is so.</s>", "ending", "an end of a sentence at the end", 1.0),
        ("It is so. \n", "ending", "white space at the end", 1.0),
        ("这是答案。", "ending", "an end of a sentence at the end", 1.0),
        ("and then the pati", "ending", "a letter at the end", 1.0),
    ],
)
def test_features_by_hand(text: str, group: str, name: str, expected: float) -> None:
    assert value(text, group, name) == pytest.approx(expected)


def test_phrases_of_one_side() -> None:
    chosen = [f"We go on. {text}" for text in ("a b", "c d", "e f", "g 12")]
    rejected = ["a b", "c d", "e f", "g 7"]
    phrases = find_phrases(chosen, rejected)
    assert set(phrases.texts) == {"we", "go", "on", "we go", "go on", "we go on", "<start> we", "<start> we go"}
    assert phrases.strength(np.ones(4, dtype=bool)) == pytest.approx([2.0] * 8)  # 4 / sqrt(4)
    assert (phrases.in_chosen == 4).all() and (phrases.in_rejected == 0).all()
    best = phrases.choose(np.ones(4, dtype=bool), 3)
    assert (phrases.columns(best, 4) == 1).all() and best.shape == (3,)
    closings = find_closings([f"x {i} 答案" for i in range(4)], [f"x {i} 果" for i in range(4)])
    assert set(closings.texts) == {"案", "果", "答案", "# 答 案", "# 果", "x # 果"}
    assert find_phrases(["a"], ["b"]).texts == []
