"""Pairs that stand twice, say the same on both sides or contradict each other; prompts that are nearly the same.

Texts are compared without case and white space. Contradiction: within one prompt, the pairs' preferences go in a circle
(a above b and b above a, or through more texts). That a text is chosen in one pair and rejected in another is no
contradiction by itself: in a ranking the middle ones are; it is counted as a note.

Near-duplicate prompts share at least NEAR of their short runs of words (`overlap`; Jaccard, exact); runs that more than
5% of the prompts have, an instruction for example, are left out.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from data_tools.lint_checks import Check, share_check
from data_tools.lint_rows import PairRow, folded
from data_tools.overlap import LEAST, SHINGLE, common_limit, grams_of, units_of

NEAR = 0.8


def copies(rows: Sequence[PairRow], limit: float) -> list[Check]:
    """Everything about copies; limit: the share of rows above which one is refused."""
    keys = [tuple(folded(text) for text in (row.prompt, row.chosen, row.rejected)) for row in rows]
    seen: dict[tuple[str, ...], str] = {}
    repeated = [row.id for row, key in zip(rows, keys, strict=True) if seen.setdefault(key, row.id) != row.id]
    turned = _contradicting(rows, keys)
    prompts = Counter(key[0] for key in keys)
    both = _on_both_sides(rows, keys)
    twins = list(near_duplicates([row.prompt for row in rows]))
    near = [rows[index].id for index, _, _ in twins]
    return [
        share_check(
            "equal",
            [row.id for row in rows if row.same],
            len(rows),
            "pairs say the same on both sides (apart from case and white space)",
            limit=limit,
            remedy="they teach nothing; remove them",
        ),
        share_check(
            "duplicate",
            repeated,
            len(rows),
            "pairs repeat another one",
            limit=limit,
            remedy="they weigh double; remove them",
        ),
        share_check(
            "conflict",
            turned,
            len(rows),
            "pairs contradict others of their prompt (what is above the other goes in a circle)",
            limit=limit,
            remedy="they cancel each other; keep one direction",
        ),
        share_check(
            "reused",
            both,
            len(rows),
            "pairs choose a text that another pair of the prompt rejects",
            limit=None,
            remedy="right in a ranking; wrong where a text is either correct or not",
        ),
        share_check(
            "prompts",
            [row.id for row, key in zip(rows, keys, strict=True) if prompts[key[0]] > 1],
            len(rows),
            f"pairs share their prompt with another one ({len(prompts)} prompts, at most "
            f"{max(prompts.values(), default=0)} pairs of one)",
            limit=None,
            remedy="split held-out parts by prompt, never by row",
        ),
        share_check(
            "near",
            near,
            len(rows),
            f"pairs have a prompt nearly the same as an earlier one's (at least {NEAR:.0%} of its short runs of words)",
            limit=None,
            remedy="split held-out parts so that these stay together",
            more={"twins": [[rows[index].id, rows[other].id, round(share, 3)] for index, other, share in twins[:50]]},
        ),
    ]


def _contradicting(rows: Sequence[PairRow], keys: Sequence[tuple[str, ...]]) -> list[str]:
    below: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for prompt, chosen, rejected in keys:
        if chosen != rejected:
            below[prompt][chosen].add(rejected)
    return [
        row.id
        for row, (prompt, chosen, rejected) in zip(rows, keys, strict=True)
        if chosen != rejected and len(below[prompt]) > 1 and _reaches(below[prompt], rejected, chosen)
    ]


def _reaches(below: Mapping[str, set[str]], start: str, goal: str) -> bool:
    seen, open_ = {start}, [start]
    while open_:
        for text in below.get(open_.pop(), ()):
            if text == goal:
                return True
            if text not in seen:
                seen.add(text)
                open_.append(text)
    return False


def _on_both_sides(rows: Sequence[PairRow], keys: Sequence[tuple[str, ...]]) -> list[str]:
    rejected = {(prompt, text) for prompt, chosen, text in keys if chosen != text}
    return [row.id for row, key in zip(rows, keys, strict=True) if key[1] != key[2] and key[:2] in rejected]


def near_duplicates(texts: Sequence[str], near: float = NEAR) -> Iterator[tuple[int, int, float]]:
    """(index, index of an earlier text, Jaccard share) of each text that is near an earlier, different one.

    Exact: texts with a share of `near` have one of their rarest runs in common (prefix filter, Chaudhuri et al. 2006).
    """
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(folded(text), index)
    runs = {}
    for text, index in first.items():
        units, kind = units_of(text)
        runs[index] = set(grams_of(units, SHINGLE[kind]))
    held = Counter(run for own in runs.values() for run in own)
    limit = common_limit(len(runs))
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, own in runs.items():
        own = runs[index] = {run for run in own if held[run] <= limit}
        if len(own) < LEAST:
            continue
        rare = sorted(own, key=lambda run: (held[run], run))[: len(own) - math.ceil(near * len(own)) + 1]
        others = {other for run in rare for other in holders[run]}
        shares = [(_jaccard(own, runs[other]), -other) for other in others if _sizes_fit(own, runs[other], near)]
        best = max(shares, default=(0.0, 0))
        if best[0] >= near:
            yield index, -best[1], best[0]
        for run in rare:
            holders[run].append(index)


def _sizes_fit(one: set[tuple[str, ...]], other: set[tuple[str, ...]], near: float) -> bool:
    small, large = sorted((len(one), len(other)))
    return small >= near * large


def _jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
