"""Is a right answer still within reach after each step of an answer? Labels for steps, from completions of beginnings.

    python -m data_tools.rollouts paths --pool pool.jsonl --split line --out paths.jsonl
    python -m data_tools.rollouts requests --paths paths.jsonl --k 8 --max-tokens 256 --out R.jsonl
    python -m eval.sample --model SIMULATOR --prompts R.jsonl --out S.jsonl
    python -m data_tools.verify --kind number --tasks Q.jsonl --prompts R.jsonl --samples S.jsonl --out V.jsonl
    python -m data_tools.rollouts labels --paths paths.jsonl --requests R.jsonl --samples S.jsonl --verdicts V.jsonl \\
        --k 8 --out labels.jsonl --outcome-out outcome.jsonl

`paths` cuts judged answers into steps (data_tools/steps.py), and known solutions with --gold-paths. `requests` asks for
--k completions of every beginning (the question, and the answer up to a step's end as `prefix`); a beginning that
several paths share is asked for once. A step's count is how many of them were right; its hard label is 1 where the
count is above --delta, its soft label count / completions. A known solution's steps count as all right, unasked.

Fewer completions: `--at-once 2` asks for 2 first; the same command with --drawn, --samples and --verdicts of what came
asks for 2 more where the hard label is not decided yet (by a count above --delta, or too few left to reach one), until
it says that no path is open (--state writes that into a file, for a recipe's loop). Hard labels are those of all --k
completions then; soft ones lean to 0 and 1.
`--search first_error` finds the first step with label 0 by halving and takes all steps before it for right and all from
it on for wrong: about log2(steps) beginnings a path, in as many rounds of that command, and no soft labels.

In rounds with a pool that grows and a simulator that stays, `paths --only-round 2` takes that round's answers, and
`labels --earlier labels_1.jsonl --earlier-outcome outcome_1.jsonl` puts the rows of before in front of them.

A row of labels: id, question_id, prompt, steps, rest (the line with the answer, no step), counts, completions, K, hard,
soft, correct (the whole answer), gold, round. --outcome-out: the same paths with every step labelled by `correct`.
"""

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.command import counted, positive, run
from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.pairs.exchange import RequestRow, read_answers, write_requests
from data_tools.pool import add_source, attempts_of, by_question, read_names, usable
from data_tools.rollout_paths import StepPath, gold_paths, read_paths
from data_tools.rounds import write_state
from data_tools.samples import Prompt, prompt_digest, read_prompts
from data_tools.steps import ANSWER_LINE, UNITS, compiled, split_steps

Tally = tuple[int, int]
"""Right completions of a beginning, and all of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    return run(_parser(), argv, {"paths": _write_paths, "requests": _write_requests, "labels": _write_labels})


def hard_label(tally: Tally, k: int, delta: int) -> int | None:
    """1, 0, or None while more completions, up to k, can still change it."""
    right, drawn = tally
    if right > delta:
        return 1
    return 0 if right + max(k - drawn, 0) <= delta else None


def steps_wanted(labels: Sequence[int | None], search: str) -> tuple[list[int], list[int | None]]:
    """Which steps' beginnings are to be completed, and the labels that follow from what is known of them.

    search "all": every step. "first_error": the middle of what is open, then of the half that is left, ...; a label
    stays None while the search is not over.
    """
    if search == "all":
        return list(range(len(labels))), list(labels)
    asked: list[int] = []
    low, high = -1, len(labels)  # every step up to low is right, from high on wrong
    while high - low > 1:
        middle = (low + high) // 2
        asked.append(middle)
        if labels[middle] is None:
            return asked, [1 if step <= low else 0 if step >= high else None for step in range(len(labels))]
        low, high = (middle, high) if labels[middle] else (low, middle)
    return asked, [int(step <= low) for step in range(len(labels))]


def _write_paths(args: argparse.Namespace) -> None:
    dropped = Counter[str]()
    pattern = compiled(args.pattern, "--pattern") if args.pattern is not None else None
    answer_line = _answer_line(args.answer_line)
    attempts = usable(attempts_of(args), invalid=args.invalid, dropped=dropped)
    if args.only_round is not None:
        dropped["of other rounds"] = sum(own.round != args.only_round for own in attempts)
        attempts = [own for own in attempts if own.round == args.only_round]
    paths: list[StepPath] = []
    for attempt in attempts:
        found = split_steps(attempt.text, args.split, pattern=pattern, answer_line=answer_line)
        if not found.steps:
            dropped["without a step"] += 1
            continue
        name = f"{attempt.question_id}#{attempt.tag}"
        correct = attempt.verdict == "correct"
        common = {"prompt": attempt.prompt, "steps": found.steps, "rest": found.rest, "made_by": attempt.made_by}
        paths.append(StepPath(id=name, question_id=attempt.question_id, correct=correct, round=attempt.round, **common))
    if args.gold_paths is not None:
        texts = read_names(args.gold_paths)
        prompts = {name: own[0].prompt for name, own in by_question(attempts).items()}
        gold_drop = compiled(args.gold_drop, "--gold-drop") if args.gold_drop is not None else None
        cut = {"unit": args.split, "pattern": pattern, "answer_line": answer_line}
        paths += gold_paths(texts, prompts, args.gold_field, gold_drop, cut, dropped)
    write_rows(args.out, (path.row() for path in paths))
    gold, steps = sum(path.gold for path in paths), sum(len(path.steps) for path in paths)
    print(f"{len(paths)} paths ({gold} known solutions), {steps} steps in {args.out}{counted(dropped)}")


def _answer_line(said: str) -> re.Pattern[str] | None:
    if said in ("auto", "step"):
        return ANSWER_LINE if said == "auto" else None
    return compiled(said, "--answer-line")


def _write_requests(args: argparse.Namespace) -> None:
    paths = [path for path in read_paths(args.paths) if not path.gold]
    tallies, names = _tallies(args.drawn, args.samples, args.verdicts)
    asked: dict[str, RequestRow] = {}
    states, tokens, more, open_paths = Counter[str](), 0, 0, 0
    for path in paths:
        digests = [prompt_digest(path.prompt, path.prefix(step)) for step in range(len(path.steps))]
        labels = [hard_label(tallies.get(digest, (0, 0)), args.k, args.delta) for digest in digests]
        steps, known = steps_wanted(labels, args.search)
        open_paths += None in known
        for step in steps:
            if digests[step] in asked:
                states["shared"] += 1
                continue
            drawn = tallies.get(digests[step], (0, 0))[1]
            n = _how_many(drawn, labels[step], args)
            more += n - drawn
            settings = {"n": n} | ({"max_tokens": args.max_tokens} if args.max_tokens else {})
            tokens += (n - drawn) * (args.max_tokens or 0)
            columns = {"prefix": path.prefix(step), "question_id": path.question_id, "settings": settings}
            name = names.get(digests[step], f"{path.id}#{step}")
            asked[digests[step]] = RequestRow(id=name, prompt=path.prompt, more=columns)
    write_requests(args.out, asked.values())
    cost = f"at most {tokens} tokens" if args.max_tokens else "as many tokens each as the sampler's --max-tokens"
    total = sum(len(path.steps) for path in paths)
    if args.state is not None:
        write_state(args.state, stops=not more, because=f"{open_paths} paths open, {more} completions to draw")
    head = f"{len(paths)} paths, {total} steps: {len(asked)} beginnings ({states['shared']} steps share one)"
    print(f"{head}; {more} completions to draw, {cost}; {open_paths} paths open; {args.out}")


def _how_many(drawn: int, label: int | None, args: argparse.Namespace) -> int:
    """Completions of a beginning: those that are there and, while its label is open, some more."""
    by_parts = args.at_once < args.k or args.search == "first_error"
    if by_parts and label is not None:
        return drawn
    return max(drawn, min(args.k, drawn + args.at_once))


def _tallies(
    requests: str | None, samples: str | None, verdicts: str | None
) -> tuple[dict[str, Tally], dict[str, str]]:
    """Of what was drawn so far: digest of a beginning to its tally, and to the id of its request."""
    given = [value for value in (requests, samples, verdicts) if value is not None]
    if not given:
        return {}, {}
    if requests is None or samples is None or verdicts is None:
        raise UserError("completions so far: give the requests, --samples and --verdicts, or none of them")
    prompts: dict[str, Prompt] = {prompt.id: prompt for prompt in read_prompts(requests)}
    found: dict[str, Tally] = {}
    for answer in read_answers(requests, samples, verdicts):
        digest = prompts[answer.id].digest
        right, drawn = found.get(digest, (0, 0))
        found[digest] = right + (answer.verdict == "correct"), drawn + 1
    return found, {prompt.digest: name for name, prompt in prompts.items()}


def _write_labels(args: argparse.Namespace) -> None:
    tallies, _ = _tallies(args.requests, args.samples, args.verdicts)
    if (args.earlier_outcome is None) != (args.earlier is None or args.outcome_out is None):
        raise UserError("--earlier-outcome: goes with --earlier and --outcome-out; give it where both are given")
    rows = [] if args.earlier is None else _rows_of(args.earlier)
    outcome = [] if args.earlier_outcome is None else _rows_of(args.earlier_outcome)
    there, dropped = {row["id"] for row in rows}, Counter[str]()
    for path in read_paths(args.paths):
        if path.id in there:
            dropped["labelled before"] += 1
            continue
        row = _gold_row(path, args.k) if path.gold else _labelled(path, tallies, args, dropped)
        if row is not None:
            rows.append(row)
            label = int(path.correct)
            every = [label] * len(path.steps)
            outcome.append({**row, "counts": None, "completions": None, "hard": every, "soft": list(map(float, every))})
    write_rows(args.out, rows)
    if args.outcome_out is not None:
        write_rows(args.outcome_out, outcome)
    labels = Counter(label for row in rows for label in row["hard"])
    head = f"{len(rows)} paths, {labels[1]} steps right and {labels[0]} wrong in {args.out}"
    print(head + counted(dropped))


def _rows_of(path: str) -> list[dict[str, Any]]:
    """Rows that `labels` wrote, as they are. Raises DataErrors; a file of no bytes has none."""

    def check(item: tuple[int, object]) -> dict[str, Any]:
        line, row = item
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not isinstance(row.get("hard"), list):
            raise DataError(path, line, field="hard", problem="is missing, or the id: these are no labels")
        return row

    return check_each(iter_jsonl(path, may_be_empty=True), check)


def _labelled(
    path: StepPath, tallies: Mapping[str, Tally], args: argparse.Namespace, dropped: Counter[str]
) -> dict[str, Any] | None:
    """A path's row, or None, counted, where a step's completions are missing or too few."""
    found = [tallies.get(prompt_digest(path.prompt, path.prefix(step)), (0, 0)) for step in range(len(path.steps))]
    asked, hard = steps_wanted([hard_label(tally, args.k, args.delta) for tally in found], args.search)
    if any(found[step][1] == 0 for step in asked):
        dropped["a step without completions"] += 1
        return None
    if None in hard:
        dropped["a label still open"] += 1
        return None
    counts = [right if step in asked else None for step, (right, _) in enumerate(found)]
    completions = [drawn if step in asked else 0 for step, (_, drawn) in enumerate(found)]
    soft = [right / drawn for right, drawn in found] if args.search == "all" else None
    return _row(path, args.k, counts, completions, hard, soft)


def _gold_row(path: StepPath, k: int) -> dict[str, Any]:
    count = len(path.steps)
    return _row(path, k, [k] * count, [0] * count, [1] * count, [1.0] * count)


def _row(
    path: StepPath,
    k: int,
    counts: Sequence[int | None],
    completions: Sequence[int],
    hard: Sequence[int | None],
    soft: Sequence[float] | None,
) -> dict[str, Any]:
    labels = {"counts": counts, "completions": completions, "K": k, "hard": hard, "soft": soft}
    return {**path.row(), **labels}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.rollouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cutting = commands.add_parser("paths", help="judged answers in steps", allow_abbrev=False)
    add_source(cutting)
    cutting.add_argument("--split", required=True, choices=UNITS, help="what a step is")
    cutting.add_argument("--pattern", help="--split regex: each match ends a step")
    cutting.add_argument(
        "--answer-line",
        default="auto",
        help="how a line at the end begins that gives the answer and is no step: a regular expression, auto (default: "
        "English, Persian, Chinese, ####, boxed), or step: it is one",
    )
    cutting.add_argument(
        "--invalid", choices=["drop", "wrong"], default="drop", help="answers that could not be read (default drop)"
    )
    cutting.add_argument("--only-round", type=int, metavar="N", help="answers of this round of the pool alone")
    cutting.add_argument("--gold-paths", help="JSON Lines of questions with known solutions")
    cutting.add_argument("--gold-field", default="answer", help="their column (default answer)")
    cutting.add_argument("--gold-drop", help="regular expression of what is taken out of them: '<<.*?>>'")
    asking = commands.add_parser("requests", help="completions to draw", allow_abbrev=False)
    asking.add_argument("--max-tokens", type=positive, help="of a completion (default: the sampler's)")
    asking.add_argument("--at-once", type=positive, default=math.inf, help="completions a beginning (default --k)")
    asking.add_argument("--drawn", help="the requests that the completions so far were drawn for")
    asking.add_argument("--state", help="file that begins with stop when no completion is left to draw")
    labelling = commands.add_parser("labels", help="labels from completions", allow_abbrev=False)
    labelling.add_argument("--requests", required=True, help="what was asked")
    labelling.add_argument("--outcome-out", help="JSON Lines: the same paths, each step labelled by the whole answer")
    labelling.add_argument("--earlier", metavar="F", help="labels of earlier rounds, which come first")
    labelling.add_argument("--earlier-outcome", metavar="F", help="the same for --outcome-out")
    for each in (asking, labelling):
        each.add_argument("--paths", required=True, help="JSON Lines that `paths` wrote")
        each.add_argument("--samples", required=each is labelling, help="completions drawn")
        each.add_argument("--verdicts", required=each is labelling, help="verdicts on them, judged with their prefix")
        each.add_argument("--k", type=positive, default=8, help="completions of a beginning (default 8)")
        each.add_argument("--delta", type=int, default=0, help="a step is right if more are right (default 0)")
        each.add_argument("--search", choices=["all", "first_error"], default="all", help="(default all)")
    for each in (cutting, asking, labelling):
        each.add_argument("--out", required=True, help="JSON Lines, written anew and whole")
    return parser


if __name__ == "__main__":
    sys.exit(main())
