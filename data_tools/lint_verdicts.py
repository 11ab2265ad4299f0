"""Who is right, and where the pairs come from: verdicts by side, the mixture of sources, a table of them.

Verdicts are the records' own (`verified`). Where a side has none and the questions are given, a rule judges it
(`data_tools.questions.judge`; options and numbers only), and the table says so.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from data_tools.lint_checks import Check, share_check
from data_tools.lint_classifier import separations
from data_tools.lint_rows import PairRow, groups_of
from data_tools.questions import RULE_KINDS, Question, judge

LEAST_OF_SOURCE = 50
"""A source with fewer pairs gets no AUC of its own."""
MOST_OF_SOURCE = 500
"""And not more than so many are fitted: enough for an interval of 0.04 to either side."""
NOBODY = "unjudged"


@dataclass(frozen=True, slots=True)
class Judged:
    """One pair's verdicts: correct | wrong | invalid | unjudged by side."""

    id: str
    source: str
    chosen: str
    rejected: str


def judge_rows(
    rows: Sequence[PairRow], question_of: Callable[[PairRow], Question | None], sample: Sequence[int]
) -> tuple[list[Judged], int]:
    """Every pair's verdicts, and how many of the sides a rule judged here; only pairs of the sample (indexes) are."""
    sampled = set(sample)
    by_rule = 0
    judged = []
    for index, row in enumerate(rows):
        question = question_of(row) if index in sampled else None
        sides = {}
        for side, text in (("chosen", row.chosen), ("rejected", row.rejected)):
            verdict = row.verified[side]
            if verdict is None and question is not None and question.kind in RULE_KINDS and question.kind != "code":
                verdict, by_rule = judge(question, text).verdict, by_rule + 1
            sides[side] = str(verdict or NOBODY)
        judged.append(Judged(row.id, row.source, sides["chosen"], sides["rejected"]))
    return judged, by_rule


def verdict_checks(judged: Sequence[Judged], by_rule: int, limit: float) -> list[Check]:
    """Chosen that is wrong, rejected that is correct, both judged alike; none where nothing is judged."""
    known = [own for own in judged if (own.chosen, own.rejected) != (NOBODY, NOBODY)]
    if not known:
        return []
    table = Counter((own.chosen, own.rejected) for own in judged)
    shown = [{"chosen": chosen, "rejected": rejected, "pairs": count} for (chosen, rejected), count in table.items()]
    more = {"table": sorted(shown, key=lambda row: -row["pairs"]), "by_rule": by_rule}
    return [
        share_check(
            "chosen_wrong",
            [own.id for own in known if own.chosen == "wrong"],
            len(known),
            "judged pairs have a chosen text that is wrong",
            limit=limit,
            remedy="drop them, or have them judged anew",
            more=more,
        ),
        share_check(
            "rejected_correct",
            [own.id for own in known if own.rejected == "correct"],
            len(known),
            "judged pairs have a rejected text that is correct",
            limit=limit,
            remedy="right where pairs are about style; else drop them",
        ),
        share_check(
            "chosen_invalid",
            [own.id for own in known if own.chosen == "invalid"],
            len(known),
            "judged pairs have a chosen text in which no single answer can be read",
            limit=None,
            remedy="look at some: an answer that a rule cannot read is hard to learn to give",
        ),
    ]


def sources_table(rows: Sequence[PairRow], judged: Sequence[Judged], *, sample: Sequence[int], seed: int) -> list[Any]:
    """A row for each source, largest first: pairs, share, prompts, mean characters by side, verdicts, AUC.

    auc: of all surface features together, fitted on the source's pairs alone, at most MOST_OF_SOURCE; None below
    LEAST_OF_SOURCE of them in `sample`, the indexes of rows that features are looked at in.
    """
    members: Mapping[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        members[row.source].append(index)
    sampled = set(sample)
    table = []
    for source, own in sorted(members.items(), key=lambda item: (-len(item[1]), item[0])):
        texts = [rows[index] for index in own]
        said = [judged[index] for index in own]
        table.append(
            {
                "source": source,
                "pairs": len(own),
                "share": len(own) / len(rows),
                "prompts": len({row.prompt for row in texts}),
                "chosen_characters": fmean(len(row.chosen) for row in texts),
                "rejected_characters": fmean(len(row.rejected) for row in texts),
                "chosen_wrong": sum(one.chosen == "wrong" for one in said),
                "rejected_correct": sum(one.rejected == "correct" for one in said),
                "unjudged": sum(NOBODY in (one.chosen, one.rejected) for one in said),
                **_auc_of(rows, [index for index in own if index in sampled], len(members), seed),
            }
        )
    return table


def _auc_of(rows: Sequence[PairRow], own: Sequence[int], sources: int, seed: int) -> dict[str, Any]:
    """`auc`, `low`, `high` of one source among several."""
    few = [rows[index] for index in own[:: -(-len(own) // MOST_OF_SOURCE) or 1]]
    groups = groups_of(few)
    if sources < 2 or len(few) < LEAST_OF_SOURCE or len(set(groups)) < 2:
        return {"auc": None, "low": None, "high": None}
    found = separations([row.chosen for row in few], [row.rejected for row in few], groups, seed=seed, only="all")[0]
    return {"auc": found.auc, "low": found.low, "high": found.high, "cue": found.cues[0].name if found.cues else ""}


def sampled_indexes(rows: Sequence[PairRow], at_most: int, seed: int) -> list[int]:
    """Pairs with two different sides, or `at_most` of them drawn by the seed, in the file's order."""
    usable = [index for index, row in enumerate(rows) if not row.same]
    if len(usable) <= at_most:
        return usable
    drawn = np.random.default_rng(seed).choice(len(usable), size=at_most, replace=False)
    return [usable[index] for index in sorted(drawn.tolist())]
