"""Pairs of answers to one question whose process rewards lie apart: r(chosen) - r(rejected) >= eta.

    python -m data_tools.pairs.process pairs --pool pool.jsonl --scores scores.jsonl --eta 0.2 --aggregate mean \\
        --require-correct chosen --out pairs.jsonl

Scores: JSON Lines of `id`, `sample` (both as in the answers; without `sample` the id ends in "#<sample>"), `score`, and
`step_scores`, a list from 0 to 1 (null and [] of an answer that has none). r is `score`, or with --aggregate the mean,
min, last or product of the step scores (SIPF: mean). --require-correct chosen (default): the chosen answer is judged
right; both: and the rejected one wrong; none: the reward alone decides. Widest apart first, unless --pick random.
Nothing is scored here.
"""

import argparse
import math
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from data_tools.command import counted, run
from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl
from data_tools.pairs.record import write_pairs
from data_tools.pairs.selection import (
    Candidate,
    add_limits,
    limits_of,
    record_of,
    summary_of_lengths,
    take,
    unique_texts,
    write_sft,
)
from data_tools.pool import Attempt, add_source, attempts_of, by_question, usable
from data_tools.questions import id_of

SOURCE = "process"
AGGREGATES = {
    "mean": lambda scores: sum(scores) / len(scores),
    "min": min,
    "last": lambda scores: scores[-1],
    "product": math.prod,
}
ROUNDING = 1e-9
"""0.3 and 0.1 are 0.2 apart."""
Scores = Mapping[tuple[str, int], float]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"pairs": _write_pairs})


def read_scores(path: str, aggregate: str | None) -> dict[tuple[str, int], float]:
    """(id, sample) to the reward of an answer. aggregate: None takes `score`. Raises DataErrors."""
    found: dict[tuple[str, int], float] = {}

    def check(row: tuple[int, object]) -> None:
        line, value = row
        if not isinstance(value, dict):
            raise DataError(path, line, field=None, problem=f"expected an object, got {type(value).__name__}")
        name, sample = id_of(value, path, line), value.get("sample")
        if sample is None:
            name, _, last = name.rpartition("#")
            if not name or not last.isdecimal():
                raise DataError(path, line, field="sample", problem="missing, and the id does not end in '#<sample>'")
            sample = int(last)
        if isinstance(sample, bool) or not isinstance(sample, int):
            raise DataError(path, line, field="sample", problem=f"expected a whole number, got {sample!r:.40}")
        if (name, sample) in found:
            raise DataError(path, line, field="sample", problem=f"answer {sample} of '{name}' is scored twice")
        if value.get("score") is None and not value.get("step_scores"):  # an answer without text has no steps
            return
        if aggregate is None:
            found[name, sample] = _number(value.get("score"), path, line, "score")
            return
        steps = value.get("step_scores")
        if not isinstance(steps, list) or not steps:
            problem = "expected a list with a number for each step; without --aggregate `score` is taken"
            raise DataError(path, line, field="step_scores", problem=problem)
        found[name, sample] = AGGREGATES[aggregate]([_number(own, path, line, "step_scores") for own in steps])

    check_each(iter_jsonl(path, may_be_empty=True), check)
    return found


def candidates(
    attempts: Sequence[Attempt], scores: Scores, *, eta: float, require: str, pick: str, seed: int
) -> list[Candidate]:
    """Pairs of one question's answers at least eta apart, in the order in which they are to be taken.

    Equal scores are never a pair, whatever eta is.
    """
    found = []
    for better in attempts:
        for worse in attempts:
            margin = scores[better.key] - scores[worse.key]
            right = require == "none" or better.verdict == "correct"
            wrong = require != "both" or worse.verdict != "correct"
            if margin > 0 and margin >= eta - ROUNDING and right and wrong:
                found.append((margin, better, worse))
    if pick == "random" and found:
        random.Random(f"{seed}\0{attempts[0].question_id}").shuffle(found)
    else:
        found.sort(key=lambda own: -own[0])
    return [(better, worse) for _, better, worse in found]


def _number(value: object, path: str, line: int, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(path, line, field=field, problem=f"expected a number, got {value!r:.40}")
    return float(value)


def _write_pairs(args: argparse.Namespace) -> None:
    if not 0 <= args.eta < math.inf:
        raise UserError(f"--eta {args.eta}: must be 0 or more")
    limits, dropped = limits_of(args), Counter[str]()
    attempts, scores = attempts_of(args), read_scores(args.scores, args.aggregate)
    pairs: list[Candidate] = []
    for own in by_question(usable(attempts, invalid=args.invalid, dropped=dropped)).values():
        if len({attempt.prompt for attempt in own}) > 1:
            raise UserError(f"question '{own[0].question_id}' was asked in several wordings; a pair has one prompt")
        scored = [attempt for attempt in unique_texts(own, dropped) if attempt.key in scores]
        dropped["without a score"] += sum(attempt.key not in scores for attempt in own)
        ordered = candidates(scored, scores, eta=args.eta, require=args.require_correct, pick=args.pick, seed=args.seed)
        pairs += take(ordered, limits, dropped)
    write_pairs(args.out, (record_of(pair, SOURCE, args.round, lambda attempt: scores[attempt.key]) for pair in pairs))
    rows = f", {write_sft(args.sft, pairs, SOURCE, args.sft_per)} supervised rows in {args.sft}" if args.sft else ""
    verdicts = Counter((pair[0].verdict == "correct", pair[1].verdict == "correct") for pair in pairs)
    judged = f" ({verdicts[True, False]} right over wrong, {verdicts[True, True]} of two right, "
    judged += f"{verdicts[False, False]} of two wrong, {verdicts[False, True]} wrong over right)"
    head = f"{len(by_question(attempts))} questions, {len(attempts)} answers: {len(pairs)} pairs{judged} in {args.out}"
    print(f"{head}{rows}{summary_of_lengths(pairs, limits.length)}{counted(dropped)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.pairs.process",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("pairs", help="pairs from scored answers", allow_abbrev=False)
    add_source(building)
    building.add_argument("--scores", required=True, help="JSON Lines of scores, see above")
    building.add_argument("--eta", type=float, default=0.1, help="least difference of the rewards (default 0.1)")
    building.add_argument("--aggregate", choices=list(AGGREGATES), help="of step_scores (default: take score)")
    building.add_argument(
        "--require-correct", choices=["chosen", "both", "none"], default="chosen", help="(default chosen)"
    )
    building.add_argument("--pick", choices=["margin", "random"], default="margin", help="(default margin)")
    building.add_argument("--seed", type=int, default=0, help="--pick random (default 0)")
    building.add_argument(
        "--invalid", choices=["drop", "wrong"], default="drop", help="answers that could not be read (default drop)"
    )
    add_limits(building)
    return parser


if __name__ == "__main__":
    sys.exit(main())
