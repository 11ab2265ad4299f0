"""One result of the lint: what was looked at, the number, whether it is refused, and which rows to look at.

Two kinds of numbers: an AUC within pairs (0.5 is chance), and a share of rows. A result without a limit is a note.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SURE = 0.75
"""An AUC is refused only where its interval begins above this: a small set may be above a limit by chance."""
EXAMPLES = 5
"""Ids named with a result; the page and the JSON file have as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """name: what `--allow` takes. value: AUC or share; limit: the largest that passes, None for a note.

    text: one line for a person. remedy: what to do. ids: rows to look at, first ones or strongest ones.
    """

    name: str
    value: float
    limit: float | None
    text: str
    remedy: str = ""
    ids: Sequence[str] = ()
    interval: tuple[float, float] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exceeds(self) -> bool:
        """Above the limit, and not by what a small set may show by chance."""
        if self.limit is None or self.value <= self.limit:
            return False
        return self.interval is None or self.interval[0] > min(SURE, self.limit)

    @property
    def found(self) -> bool:
        """Whether there is anything to say about a share."""
        return self.value > 0


def share_check(
    name: str, ids: Sequence[str], total: int, what: str, *, limit: float | None, remedy: str, more: Any = None
) -> Check:
    """A check on a share of rows, with the first ids. what: completes "12 of 400 ..."."""
    text = f"{len(ids)} of {total} {what}"
    named = list(dict.fromkeys(ids))[:EXAMPLES]
    return Check(
        name=name,
        value=len(ids) / max(1, total),
        limit=limit,
        text=text,
        remedy=remedy,
        ids=named,
        more=more or {},
    )
