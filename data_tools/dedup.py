"""One answer of each path: copies, equal workings and near copies of a question's answers are left out.

    python -m data_tools.dedup --pool pool.jsonl --by math --check-calculations drop --out distinct.jsonl

Answers of one question and one verdict are compared. Of those with one signature (data_tools/signatures.py) the one
stays that is farthest, by edit distance, from the nearest that stays already; the first where none does or two are as
far. What `--earlier` holds stays as it is, comes first in --out, and the new ones are held against it.

    --min-distance D   leave out what is nearer than this share of the longer one's length to one that stays
    --rule sipf-code   leave out programs nearer to one that stays than 0.8 x (mean line length + 1) + |difference in
                       length| / 2 characters (SIPF's rule for code; the lines are the new one's)

For n answers of L characters at most n^2 / 2 distances are measured, each L^2 / 64 machine operations.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.command import counted, run
from data_tools.edit_distance import edit_distance
from data_tools.errors import UserError
from data_tools.pool import Attempt, add_source, attempts_of, by_question, read_pool, without, write_pool
from data_tools.signatures import KINDS, Kind, Signature, signature, wrong_calculations
from data_tools.steps import FENCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What counts as the same, see the module's text."""

    by: Kind
    min_distance: float = 0.0
    sipf_code: bool = False
    check_calculations: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_distance <= 1:
            raise UserError(f"--min-distance {self.min_distance}: must be from 0 to 1")

    @property
    def by_distance(self) -> bool:
        """Whether texts of different signatures can be too near."""
        return self.min_distance > 0 or self.sipf_code


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"dedup": _dedup})


def distinct(
    new: Sequence[Attempt], earlier: Sequence[Attempt], rule: Rule, dropped: Counter[str] | None = None
) -> list[Attempt]:
    """Those of one question's new answers that stay, in their order; `dropped` counts the others by reason."""
    dropped = Counter() if dropped is None else dropped
    kept: list[Attempt] = []
    for verdict in dict.fromkeys(attempt.verdict for attempt in new):
        own = [attempt for attempt in new if attempt.verdict == verdict]
        there = [attempt for attempt in earlier if attempt.verdict == verdict]
        kept += _of_one_verdict(own, there, rule, dropped)
    order = {attempt.key: place for place, attempt in enumerate(new)}
    return sorted(kept, key=lambda attempt: order[attempt.key])


def add_rule(parser: argparse.ArgumentParser, *, needed: bool) -> None:
    """`--by` and what else a Rule is made of."""
    more = "" if needed else " (default: answers are not compared)"
    parser.add_argument("--by", choices=KINDS, required=needed, help=f"what makes two answers the same path{more}")
    parser.add_argument("--min-distance", type=float, default=0.0, help="least edit distance, share of the length")
    parser.add_argument("--rule", choices=["sipf-code"], help="SIPF's least distance between programs")
    parser.add_argument(
        "--check-calculations",
        choices=["keep", "drop"],
        default="keep",
        help="answers with a wrong calculation in <<...>> stay (default) or not",
    )


def rule_of(args: argparse.Namespace) -> Rule | None:
    """The options as a Rule, or None without --by. Raises UserError."""
    if args.by is None:
        if args.min_distance or args.rule or args.check_calculations == "drop":
            raise UserError("--min-distance, --rule, --check-calculations: need --by, what answers are compared by")
        return None
    return Rule(
        by=args.by,
        min_distance=args.min_distance,
        sipf_code=args.rule == "sipf-code",
        check_calculations=args.check_calculations == "drop",
    )


def _of_one_verdict(
    new: Sequence[Attempt], earlier: Sequence[Attempt], rule: Rule, dropped: Counter[str]
) -> list[Attempt]:
    taken = {signature(attempt.text, rule.by) for attempt in earlier}
    groups: dict[Signature, list[Attempt]] = {}
    for attempt in new:
        if rule.check_calculations and wrong_calculations(attempt.text):
            dropped["a wrong calculation"] += 1
            continue
        path = signature(attempt.text, rule.by)
        if path in taken:
            dropped["the same path"] += 1
        else:
            groups.setdefault(path, []).append(attempt)
    texts = [_compared(attempt.text, rule.by) for attempt in earlier]
    kept: list[Attempt] = []
    for group in groups.values():
        best = _farthest(group, texts, rule)
        if best is None:
            dropped["too near"] += len(group)
            continue
        dropped["the same path"] += len(group) - 1
        kept.append(best)
        texts.append(_compared(best.text, rule.by))
    return kept


def _farthest(group: Sequence[Attempt], texts: Sequence[str], rule: Rule) -> Attempt | None:
    """The answer of the group that is farthest from the nearest of the texts, or None where all are too near to one."""
    if not texts or (len(group) == 1 and not rule.by_distance):
        return group[0]
    found: tuple[int, Attempt] | None = None
    for attempt in group:
        own = _compared(attempt.text, rule.by)
        distances = [edit_distance(own, text) for text in texts]
        enough = all(d >= _least(own, text, rule) for d, text in zip(distances, texts, strict=True))
        if enough and (found is None or min(distances) > found[0]):
            found = (min(distances), attempt)
    return None if found is None else found[1]


def _least(own: str, other: str, rule: Rule) -> float:
    """The least distance, in characters, that two texts must have."""
    least = rule.min_distance * max(len(own), len(other))
    if rule.sipf_code:
        lines = own.splitlines() or [""]
        mean = sum(map(len, lines)) / len(lines)
        least = max(least, 0.8 * (mean + 1) + abs(len(own) - len(other)) / 2)
    return least


def _compared(text: str, by: Kind) -> str:
    fence = FENCE.search(text) if by == "code" else None
    return (fence["body"] if fence else text).strip()


def _dedup(args: argparse.Namespace) -> None:
    rule = rule_of(args)
    assert rule is not None
    earlier = read_pool(args.earlier) if args.earlier else []
    new = without(attempts_of(args), earlier)
    before, dropped = by_question(earlier), Counter[str]()
    kept = [
        attempt
        for name, own in by_question(new).items()
        for attempt in distinct(own, before.get(name, []), rule, dropped)
    ]
    write_pool(args.out, [*earlier, *kept])
    head = f"{len(earlier)} earlier and {len(new)} new answers: {len(kept)} of the new stay, {args.out}"
    print(head + counted(dropped))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.dedup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_source(parser)
    add_rule(parser, needed=True)
    parser.add_argument("--earlier", help="a pool that stays as it is")
    parser.add_argument("--out", required=True, help="JSON Lines of a pool, written anew and whole")
    parser.set_defaults(command="dedup")
    return parser


if __name__ == "__main__":
    sys.exit(main())
