"""Two runs on the same items: how much better is B than A, and may it be chance? Pure functions of two logs' rows.

Where both have scores of 0 and 1: McNemar's exact test, from the items that one alone got right. Always: the paired
bootstrap of the difference. Both see an item as the unit, not a sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.stats import mcnemar_exact, paired_bootstrap
from eval.summary import SEED, Row, group_rows
from trainer.errors import UserError

SHOWN = 3


def compare_rows(a: Sequence[Row], b: Sequence[Row], names: tuple[str, str] = ("A", "B")) -> dict[str, Any]:
    """Differences B - A in all and by subject. Raises UserError unless both hold the same items with the same answers.

    Rows of perplexity are compared by nats a token (less is better), all others by score.
    """
    pairs = _paired(a, b, names)
    result: dict[str, Any] = {"items": len(pairs), **_difference(pairs), "subjects": {}}
    by_subject = group_rows([mine for mine, _ in pairs])
    if len(by_subject) > 1:
        other = dict(zip((mine["id"] for mine, _ in pairs), (theirs for _, theirs in pairs), strict=True))
        for subject, own in by_subject.items():
            result["subjects"][subject] = {"items": len(own), **_difference([(row, other[row["id"]]) for row in own])}
    return result


def budget_line(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Whether two results drew equally much: samples an item, and tokens in all. a, b: results of eval.summary."""
    drawn = [_drawn(own) for own in (a, b)]
    if "samples" not in a and "samples" not in b:
        return "nothing is drawn: both runs score the same texts"
    same = a.get("samples", {}).get("n") == b.get("samples", {}).get("n")
    return f"{'the same' if same else 'NOT the same'} number of samples an item: A {drawn[0]}, B {drawn[1]}"


def _drawn(result: Mapping[str, Any]) -> str:
    if "samples" not in result:
        return "draws none"
    own, verifier = result["samples"], result.get("verifier")
    asked = f" and a verifier on {verifier['asked']} items" if verifier else ""
    return f"{own['n']} ({'tokens not known' if own['tokens'] is None else str(own['tokens']) + ' tokens'}){asked}"


def check_same_items(a: Sequence[str], b: Sequence[str], names: tuple[str, str]) -> None:
    """Raises UserError unless both lists hold the same ids."""
    for one, two, own, other in ((a, set(b), *names), (b, set(a), *reversed(names))):
        if missing := [name for name in one if name not in two]:
            shown = ", ".join(missing[:SHOWN])
            raise UserError(f"{len(missing)} items of {own} are not in {other} (first: {shown}); run both on one file")


def _paired(a: Sequence[Row], b: Sequence[Row], names: tuple[str, str]) -> list[tuple[Row, Row]]:
    mine, theirs = {row["id"]: row for row in a}, {row["id"]: row for row in b}
    check_same_items(list(mine), list(theirs), names)
    for name, row in mine.items():
        other = theirs[name]
        if (
            row.get("gold") != other.get("gold")
            or row["subject"] != other["subject"]
            or ("nats" in row) != ("nats" in other)
        ):
            raise UserError(
                f"item '{name}' is not the same in {names[0]} and {names[1]}; run both on one file and task"
            )
    return [(row, theirs[name]) for name, row in mine.items()]


def _difference(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    if "nats" in pairs[0][0]:
        return _nats(pairs)
    a, b = [mine["score"] for mine, _ in pairs], [theirs["score"] for _, theirs in pairs]
    found = paired_bootstrap(a, b, seed=SEED)
    result: dict[str, Any] = {
        "a": sum(a) / len(a),
        "b": sum(b) / len(b),
        "difference": {"value": found.value, "low": found.low, "high": found.high},
    }
    if all(score in (0, 1) for score in (*a, *b)):
        only_a = sum(x > y for x, y in zip(a, b, strict=True))
        only_b = sum(y > x for x, y in zip(a, b, strict=True))
        both = sum(x == y == 1 for x, y in zip(a, b, strict=True))
        result["mcnemar"] = {
            "both": both, "only_a": only_a, "only_b": only_b, "neither": len(a) - both - only_a - only_b,
            "p": mcnemar_exact(only_a, only_b),
        }  # fmt: skip
    return result


def _nats(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """Nats a token where both split texts alike, else nats a byte, which does not depend on the tokenizer."""
    alike = all(mine["tokens"] == theirs["tokens"] for mine, theirs in pairs)
    unit = "tokens" if alike else "bytes"
    weights = [mine[unit] for mine, _ in pairs]
    a, b = [mine["nats"] for mine, _ in pairs], [theirs["nats"] for _, theirs in pairs]
    found = paired_bootstrap(a, b, weights=weights, seed=SEED)
    return {
        "unit": f"nats a {unit[:-1]}",
        "a": sum(a) / sum(weights),
        "b": sum(b) / sum(weights),
        "difference": {"value": found.value, "low": found.low, "high": found.high},
    }
