"""Pairs of a right and a wrong answer of a model to one question: outcome supervision.

    python -m data_tools.pairs.outcome pairs --requests R.jsonl --samples S.jsonl --verdicts V.jsonl \\
        --questions Q.jsonl --pairing length --max-length-ratio 1.5 --out pairs.jsonl --sft sft.jsonl

    --pairing random   candidates in an order drawn by --seed (a function of seed and question)
    --pairing length   nearest in length first, so that length tells least
    --pairing all      every right answer with every wrong one, in the order drawn; --uses and --per-question limit it

Answers that were cut off or are empty are left out, and so is what could not be read unless --invalid wrong takes it
for wrong. `--sft` writes the chosen answers as supervised rows: the control that fine-tunes on its own right answers
(rejection sampling) then sees the same questions and texts as DPO or ORPO on the pairs. Nothing is judged here.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence

from data_tools.command import counted, run
from data_tools.errors import UserError
from data_tools.pairs.record import write_pairs
from data_tools.pairs.selection import (
    Candidate,
    Measure,
    add_limits,
    length_of,
    limits_of,
    record_of,
    summary_of_lengths,
    take,
    unique_texts,
    write_sft,
)
from data_tools.pool import Attempt, add_source, attempts_of, by_question, usable

SOURCE = "outcome"
PAIRINGS = ("random", "length", "all")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"pairs": _write_pairs})


def candidates(
    right: Sequence[Attempt], wrong: Sequence[Attempt], *, pairing: str, seed: int, length: Measure = "chars"
) -> list[Candidate]:
    """Every right answer of a question with every wrong one, in the order in which they are to be taken."""
    found = [(better, worse) for better in right for worse in wrong]
    if pairing == "random" and found:
        random.Random(f"{seed}\0{found[0][0].question_id}").shuffle(found)
    elif pairing == "length":
        found.sort(key=lambda pair: abs(length_of(pair[0], length) - length_of(pair[1], length)))
    return found


def _write_pairs(args: argparse.Namespace) -> None:
    limits, dropped = limits_of(args), Counter[str]()
    attempts = attempts_of(args)
    pairs: list[Candidate] = []
    questions = by_question(usable(attempts, invalid=args.invalid, dropped=dropped))
    sides = Counter[str]()
    for own in questions.values():
        prompts = {attempt.prompt for attempt in own}
        if len(prompts) > 1:
            problem = f"question '{own[0].question_id}' was asked in {len(prompts)} wordings; a pair has one prompt"
            raise UserError(f"{problem}, so build pairs of one wording at a time")
        right = unique_texts((attempt for attempt in own if attempt.verdict == "correct"), dropped)
        wrong = unique_texts((attempt for attempt in own if attempt.verdict != "correct"), dropped)
        sides["both"] += bool(right and wrong)
        ordered = candidates(right, wrong, pairing=args.pairing, seed=args.seed, length=limits.length)
        pairs += take(ordered, limits, dropped)
    write_pairs(args.out, (record_of(pair, SOURCE, args.round) for pair in pairs))
    rows = f", {write_sft(args.sft, pairs, SOURCE, args.sft_per)} supervised rows in {args.sft}" if args.sft else ""
    asked = len(by_question(attempts))
    head = f"{asked} questions ({sides['both']} with right and wrong answers), {len(attempts)} answers"
    print(f"{head}: {len(pairs)} pairs in {args.out}{rows}{summary_of_lengths(pairs, limits.length)}{counted(dropped)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.pairs.outcome",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("pairs", help="pairs from judged answers", allow_abbrev=False)
    add_source(building)
    building.add_argument("--pairing", choices=PAIRINGS, default="random", help="(default random)")
    building.add_argument("--seed", type=int, default=0, help="--pairing random (default 0)")
    building.add_argument(
        "--invalid", choices=["drop", "wrong"], default="drop", help="answers that could not be read (default drop)"
    )
    add_limits(building)
    return parser


if __name__ == "__main__":
    sys.exit(main())
