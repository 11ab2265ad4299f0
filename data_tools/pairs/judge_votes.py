"""What judges of pairs of answers say: one reply read strictly, two replies (both orders) as one vote, votes counted.

A judge sees two answers as first and second. It votes for an answer when it prefers that one in both orders; a judge
that prefers the same place in both is swayed by the order and votes for none.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from data_tools.verify_text import final_part, normalise

Choice = Literal["A", "B", "tie"]
Vote = Literal["one", "two", "tie", "split", "unread"]
"""For which answer; `split`: not the same in both orders; `unread`: a reply is missing or says nothing."""


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """How a reply ends: `<word>: A`, B, or `<tie>`; or the choice is all it says."""

    word: str = "Verdict"
    tie: str = "tie"

    def read(self, text: str) -> Choice | None:
        """The choice of a reply; None for any other last line. Thinking is passed over."""
        body = final_part(text)
        lines = [line.strip() for line in normalise(body or "").splitlines() if line.strip()]
        if not lines:
            return None
        choice = rf"[\[(\"']?(?P<choice>A|B|{self._spelt(self.tie)})[\])\"']?\s*[.。]?"
        match = re.fullmatch(rf"#*\s*{self._spelt(self.word)}\s*:\s*{choice}", lines[-1], re.IGNORECASE)
        if match is None and len(lines) == 1:
            match = re.fullmatch(choice, lines[0], re.IGNORECASE)
        if match is None:
            return None
        found = match["choice"].upper()
        return "A" if found == "A" else "B" if found == "B" else "tie"

    @staticmethod
    def _spelt(text: str) -> str:
        return re.escape(normalise(text).strip())


def vote_of(straight: Choice | None, swapped: Choice | None) -> Vote:
    """The vote of two replies: to answer one before two, and to two before one."""
    if straight is None or swapped is None:
        return "unread"
    if straight == swapped == "tie":
        return "tie"
    if straight == "A" and swapped == "B":
        return "one"
    return "two" if straight == "B" and swapped == "A" else "split"


@dataclass(frozen=True, slots=True)
class Decision:
    """winner: 1 or 2, or None with the reason. shares: of all judges, for answer one and answer two."""

    winner: int | None
    why: str
    shares: tuple[float, float]


def decide(votes: Iterable[Vote], *, judges: int, agree: int) -> Decision:
    """The answer that at least `agree` of the judges vote for, where fewer vote for the other."""
    counts = Counter(votes)
    one, two = counts["one"], counts["two"]
    shares = (one / judges, two / judges)
    if max(one, two) >= agree and one != two:
        return Decision(1 if one > two else 2, "", shares)
    if one and two:
        why = "judges disagree"
    elif one or two:
        why = "too few judges agree"
    else:
        why = "tie" if counts["tie"] else "swayed by the order" if counts["split"] else "no reply to read"
    return Decision(None, why, shares)


@dataclass(slots=True)
class JudgeTally:
    """How a judge behaved. first, second: replies for the place, of both orders."""

    name: str
    first: int = 0
    second: int = 0
    ties: int = 0
    unread: int = 0
    votes: Counter[str] = field(default_factory=Counter)

    def add(self, choice: Choice | None) -> None:
        """One reply."""
        self.first += choice == "A"
        self.second += choice == "B"
        self.ties += choice == "tie"
        self.unread += choice is None

    def line(self) -> str:
        """For a person: an unbiased judge chooses the first place half of the time."""
        decided = self.first + self.second
        share = f"{100 * self.first / decided:.1f}% of" if decided else "none of"
        votes = sum(self.votes.values())
        steady = self.votes["one"] + self.votes["two"] + self.votes["tie"]
        return (
            f"judge {self.name}: first place chosen in {share} {decided} decided replies, {self.ties} ties, "
            f"{self.unread} unread; {steady} of {votes} pairs the same in both orders"
        )
