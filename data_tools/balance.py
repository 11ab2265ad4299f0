"""As many right as wrong answers to each question: what is still to be drawn, and which of what was drawn is kept.

    python -m data_tools.balance requests --questions Q.jsonl --kind number --prompts P.toml --right 4 --wrong 4 \\
        --at-once 8 --tries 64 --out R.jsonl
    python -m eval.sample --model DIR --prompts R.jsonl --out S.jsonl
    python -m data_tools.verify --kind number --tasks Q.jsonl --samples S.jsonl --out V.jsonl
    python -m data_tools.balance requests ... --out R.jsonl --drawn R.jsonl --samples S.jsonl --verdicts V.jsonl
    ...                                                         # until it says that nothing is open
    python -m data_tools.balance select --requests R.jsonl --samples S.jsonl --verdicts V.jsonl --questions Q.jsonl \\
        --right 4 --wrong 4 --by math --out pool_0.jsonl

`requests` writes a row for every question, whose `n` is what was drawn and, while answers are missing and --tries are
not used up, --at-once more: the sampler then draws just these. --state writes a file that begins with "stop" when no
question is open, for a recipe's loop. `select` keeps the first --right right and --wrong wrong
answers of a question, after what --by leaves out (data_tools/dedup.py), as a pool (data_tools/pool.py).

In a later round, with `--earlier pool`, all that the pool holds stays, and of each class the pool's count times --share
more are wanted, times --share-many where it holds --many or more (SIPF: a half, and a quarter from 8 on), rounded up;
of a class that it has none of, --right or --wrong.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence

from data_tools.command import counted, positive, run
from data_tools.dedup import Rule, add_rule, distinct, rule_of
from data_tools.errors import UserError
from data_tools.pairs.carried import add_questions, read_by_id, values_of
from data_tools.pairs.exchange import RequestRow, read_prompt_texts, write_requests
from data_tools.pool import Attempt, add_source, attempts_of, by_question, read_pool, usable, without, write_pool
from data_tools.rounds import write_state

PURPOSE = "answer"
Need = tuple[int, int]
"""Right and wrong answers."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"requests": _write_requests, "select": _select})


def wanted(earlier: Sequence[Attempt], args: argparse.Namespace) -> Need:
    """How many new right and wrong answers to a question are wanted beside the earlier ones."""
    counts = Counter(attempt.verdict == "correct" for attempt in earlier)

    def more(have: int, first: int) -> int:
        if not have or not first:
            return first
        return math.ceil(have * (args.share_many if have >= args.many else args.share))

    return more(counts[True], args.right), more(counts[False], args.wrong)


def chosen(
    new: Sequence[Attempt], earlier: Sequence[Attempt], need: Need, rule: Rule | None, dropped: Counter[str]
) -> list[Attempt]:
    """The first right and wrong ones of one question's new answers, as many as needed, of each path one."""
    found = list(new) if rule is None else distinct(new, earlier, rule, dropped)
    right = [attempt for attempt in found if attempt.verdict == "correct"][: need[0]]
    wrong = [attempt for attempt in found if attempt.verdict != "correct"][: need[1]]
    dropped["not needed"] += len(found) - len(right) - len(wrong)
    return [*right, *wrong]


def _write_requests(args: argparse.Namespace) -> None:
    text = read_prompt_texts(args.prompts, [PURPOSE])[PURPOSE]
    questions, rule = read_by_id(args), rule_of(args)
    earlier = by_question(read_pool(args.earlier)) if args.earlier else {}
    drawn = _drawn(args)
    requests: list[RequestRow] = []
    states, more = Counter[str](), 0
    for question in questions.values():
        own, before = drawn.get(question.id, []), earlier.get(question.id, [])
        need = wanted(before, args)
        kept = chosen(usable(own, invalid=args.invalid, dropped=Counter()), before, need, rule, Counter())
        tries = max((attempt.sample + 1 for attempt in own), default=0)
        enough = len(kept) >= sum(need)
        state = "have enough" if enough else "used up their tries" if tries >= args.tries else "open"
        states[state] += 1
        n = min(tries + args.at_once, args.tries) if state == "open" else tries
        if n == 0:  # wanted of nothing, so nothing is asked
            continue
        more += n - tries
        prompt = text.messages(values_of(question))
        requests.append(RequestRow(id=question.id, prompt=prompt, more={"settings": {"n": n}}))
    write_requests(args.out, requests)
    counts = ", ".join(f"{states[name]} {name}" for name in ("have enough", "open", "used up their tries"))
    if args.state is not None:
        write_state(args.state, stops=not states["open"], because=counts)
    print(f"{len(questions)} questions: {counts}; {more} more answers to draw, {args.out}")


def _drawn(args: argparse.Namespace) -> dict[str, list[Attempt]]:
    """This round's answers so far, by question."""
    given = [name for name in ("drawn", "samples", "verdicts") if getattr(args, name) is not None]
    if not given:
        return {}
    if len(given) < 3:
        raise UserError("answers so far: give --drawn, --samples and --verdicts, or none of them")
    args.pool, args.requests = None, args.drawn
    return by_question(attempts_of(args))


def _select(args: argparse.Namespace) -> None:
    rule, dropped = rule_of(args), Counter[str]()
    earlier = read_pool(args.earlier) if args.earlier else []
    new = by_question(
        usable(without(attempts_of(args, round_=args.round), earlier), invalid=args.invalid, dropped=dropped)
    )
    before = by_question(earlier)
    kept: list[Attempt] = []
    short = one_sided = 0
    for name in dict.fromkeys([*before, *new]):
        there = before.get(name, [])
        need = wanted(there, args)
        own = chosen(new.get(name, []), there, need, rule, dropped)
        short += len(own) < sum(need)
        sides = {attempt.verdict == "correct" for attempt in (*there, *own)}
        one_sided += len(sides) == 1
        if args.both and len(sides) < 2:
            dropped["of a question without both"] += len(own)
            continue
        kept += own
    write_pool(args.out, [*earlier, *kept])
    right = sum(attempt.verdict == "correct" for attempt in kept)
    head = f"{len(earlier)} earlier and {right} right, {len(kept) - right} wrong new answers in {args.out}"
    print(f"{head}; {short} questions have fewer than wanted, {one_sided} one side only{counted(dropped)}")


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("requests", help="what is still to be drawn", allow_abbrev=False)
    add_questions(asking)
    asking.add_argument("--prompts", required=True, help=f"TOML with a table [{PURPOSE}]: how a question is asked")
    asking.add_argument("--at-once", type=positive, default=8, help="answers more a question (default 8)")
    asking.add_argument("--tries", type=positive, default=64, help="most answers a question (default 64)")
    asking.add_argument("--drawn", help="the requests that this round's answers so far were drawn for")
    asking.add_argument("--samples", help="this round's answers so far")
    asking.add_argument("--verdicts", help="verdicts on them")
    asking.add_argument("--state", help="file that begins with stop when no question is open")
    choosing = commands.add_parser("select", help="what is kept of what was drawn", allow_abbrev=False)
    add_source(choosing)
    choosing.add_argument("--round", type=int, default=0, help="0 (default), 1, ...: that these answers are of")
    choosing.add_argument("--both", action="store_true", help="only questions with a right and a wrong answer")
    for each in (asking, choosing):
        each.add_argument("--right", type=_count, default=4, help="right answers a question (default 4)")
        each.add_argument("--wrong", type=_count, default=4, help="wrong answers a question (default 4)")
        each.add_argument("--earlier", help="a pool of earlier rounds, which stays")
        each.add_argument("--share", type=_share, default=0.5, help="of its count, wanted more (default 0.5)")
        each.add_argument("--share-many", type=_share, default=0.25, help="where it has --many or more (default 0.25)")
        each.add_argument("--many", type=positive, default=8, help="(default 8)")
        each.add_argument(
            "--invalid", choices=["drop", "wrong"], default="drop", help="answers that could not be read (default drop)"
        )
        add_rule(each, needed=False)
        each.add_argument("--out", required=True, help="JSON Lines, written anew and whole")
    return parser


if __name__ == "__main__":
    sys.exit(main())
