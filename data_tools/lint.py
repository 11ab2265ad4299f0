"""What could a model learn from these pairs instead of the content? `python -m data_tools.lint pairs.jsonl [options]`

    surface     can length, case, punctuation, language, format, answer letters, phrases or endings tell chosen from
                rejected, each alone and all together, on pairs that the classifier has not seen? (AUC, 0.5 is chance)
    copies      both sides equal, pairs that repeat or contradict others, prompts that are nearly the same
    verdicts    chosen that is wrong, rejected that is correct: `verified` of the rows, or by a rule with --questions
    leaks       the right answer in a prompt (--questions) or a critique (--critiques)
    overlap     items of --eval files in the pairs

Each result is one line. What is above its limit ends with exit code 2: an AUC above --refuse-above, a share of rows
above --refuse-share. `--allow length,case` lets those through; `all` then judges the rest together. An AUC whose
interval begins at or below 0.75 is never refused: so few pairs may show it by chance.

Training prints a shorter note of the same kind when it starts (`lint_pairs`, `lint_groups`: `data_tools.lint_surface`).
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.lint_checks import EXAMPLES, Check, share_check
from data_tools.lint_classifier import Separation, separations
from data_tools.lint_copies import copies
from data_tools.lint_features import GROUPS
from data_tools.lint_leaks import Leaks
from data_tools.lint_report import page, report_of
from data_tools.lint_rows import PairRow, groups_of, read_rows
from data_tools.lint_surface import Finding, auc, lint_groups, lint_pairs
from data_tools.lint_verdicts import judge_rows, sampled_indexes, sources_table, verdict_checks
from data_tools.overlap import find_overlaps
from data_tools.questions import RULE_KINDS, read_questions

__all__ = ["Finding", "auc", "lint_groups", "lint_pairs", "main"]

SHARES = (
    "equal", "duplicate", "conflict", "chosen_wrong", "rejected_correct", "leak", "critique", "contamination"
)  # fmt: skip
NAMES = (*GROUPS, "all", *SHARES)
"""What `--allow` takes."""
LEAST_GROUPS = 10
"""Fewer prompts say nothing about others: no AUC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All that one run of the command found."""

    path: str
    rows: Sequence[PairRow]
    checks: Sequence[Check]
    separations: Sequence[Separation]
    looked_at: Sequence[PairRow]
    sources: Sequence[Any]
    settings: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with a line for each fault of the input and each refusal."""
    args = _parser().parse_args(argv)
    try:
        allowed = _allowed(args)
        result = lint(args, allowed)
        for check in result.checks:
            print(line_of(check))
        report = report_of(result, allowed)
        if args.json:
            _write(args.json, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        if args.html:
            _write(args.html, page(result, report))
        refused = [check for check in result.checks if check.exceeds and check.name not in allowed]
        print(_summary(result, refused, allowed))
        sys.stdout.flush()
        for check in refused:
            print(f"error: {args.pairs}: {refusal(check)}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 2 if refused else 0


def lint(args: argparse.Namespace, allowed: Sequence[str]) -> Result:
    """Everything, from the files named by the options. Raises UserError."""
    rows = read_rows(args.pairs)
    leaks = Leaks(read_questions(args.questions, args.kind)) if args.questions else None
    sample = sampled_indexes(rows, args.sample, args.seed)
    looked_at = [rows[index] for index in sample]
    found = _separations(looked_at, args, allowed)
    checks = [_surface_check(own, looked_at, args.refuse_above) for own in found]
    checks += copies(rows, args.refuse_share)
    judged, by_rule = judge_rows(rows, leaks.of if leaks else lambda row: None, sample)
    checks += verdict_checks(judged, by_rule, args.refuse_share)
    if leaks:
        checks += _leak_checks(leaks, rows, args)
    checks += [_contamination(args.pairs, path, args) for path in args.eval or ()]
    settings = {name: value for name, value in vars(args).items() if name not in ("html", "json")}
    return Result(
        path=args.pairs,
        rows=rows,
        checks=checks,
        separations=found,
        looked_at=looked_at,
        sources=sources_table(rows, judged, sample=sample, seed=args.seed),
        settings=settings,
    )


def line_of(check: Check) -> str:
    """One line of the output: note, ok, or above the limit."""
    if check.limit is None:
        return f"note  {check.name}: {check.text}"
    mark = "HIGH " if check.exceeds else "ok   "
    return f"{mark} {check.name}: {check.text}"


def refusal(check: Check) -> str:
    """What is refused, which rows show it, and what to do."""
    named = f" (for example {', '.join(check.ids)})" if check.ids else ""
    number = f"{check.value:.3f} is above {check.limit:g}"
    return f"{check.name}: {check.text}{named}: {number}; {check.remedy}, or let it through with --allow {check.name}"


def _separations(rows: Sequence[PairRow], args: argparse.Namespace, allowed: Sequence[str]) -> list[Separation]:
    groups = groups_of(rows)
    if len(set(groups)) < LEAST_GROUPS:
        return []
    texts = ([getattr(row, side) for row in rows] for side in ("chosen", "rejected"))
    return separations(*texts, groups, seed=args.seed, left_out=allowed)


def _surface_check(own: Separation, rows: Sequence[PairRow], limit: float) -> Check:
    cues = []
    for cue in own.cues[:2]:
        more = cue.more >= cue.less
        cues.append(f"{cue.name}: {'more' if more else 'less'} in chosen in {max(cue.more, cue.less):.0%} of pairs")
    text = f"AUC {own.auc:.3f} [{own.low:.3f}, {own.high:.3f}] on {own.pairs} pairs of {own.prompts} prompts"
    strongest = (-own.scores).argsort(kind="stable")[:EXAMPLES].tolist()
    return Check(
        name=own.group,
        value=own.auc,
        limit=limit,
        text="; ".join([text, *cues]),
        remedy="make the two sides alike in it, or balance the pairs",
        ids=[rows[index].id for index in strongest if own.scores[index] > 0],
        interval=(own.low, own.high),
    )


def _leak_checks(leaks: Leaks, rows: Sequence[PairRow], args: argparse.Namespace) -> Iterable[Check]:
    prompts = leaks.prompts(rows, args.refuse_share)
    if prompts.more["no_question"] == len(rows):
        raise UserError(
            f"{args.pairs}: no pair is of a question of {args.questions}; give each row its question_id, or an id that "
            "begins with the question's"
        )
    return [prompts, *(leaks.critiques(path, args.refuse_share) for path in args.critiques or ())]


def _contamination(pairs: str, path: str, args: argparse.Namespace) -> Check:
    fields = [name for name in args.eval_fields.split(",") if name]
    found = find_overlaps(
        [pairs], path, train_fields=("prompt", "chosen", "rejected"), eval_fields=fields, skip_common=True
    )
    check = share_check(
        "contamination",
        [f"{overlap.id} in {overlap.train_id}" for overlap in found.overlaps],
        found.items - found.too_short,
        f"items of {Path(path).name} stand in the pairs ({found.ngram} by a run of 13 words, {found.near} nearly "
        f"whole; {found.too_short} too short to judge)",
        limit=args.refuse_share,
        remedy="remove the pairs",
    )
    return check


def _allowed(args: argparse.Namespace) -> list[str]:
    if not 0.5 <= args.refuse_above <= 1 or not 0 <= args.refuse_share <= 1:
        raise UserError("--refuse-above must be from 0.5 to 1 (an AUC), --refuse-share from 0 to 1")
    if args.sample < 1:
        raise UserError(f"--sample {args.sample}: must be 1 or more")
    if bool(args.questions) != bool(args.kind):
        raise UserError("--questions and --kind go together")
    if args.critiques and not args.questions:
        raise UserError("--critiques needs --questions and --kind, to know the right answers")
    names = [name for part in args.allow for name in part.split(",") if name]
    for name in names:
        if name not in NAMES:
            raise UserError(f"--allow {name}: is not known; known: {', '.join(NAMES)}")
    return names


def _summary(result: Result, refused: Sequence[Check], allowed: Sequence[str]) -> str:
    passed = [check.name for check in result.checks if check.exceeds and check.name in allowed]
    parts = [f"{len(result.rows)} pairs", f"{len(result.looked_at)} looked at for surface features"]
    if not result.separations:
        parts.append(f"too few for an AUC (at least {LEAST_GROUPS} prompts)")
    parts.append(f"refused: {', '.join(dict.fromkeys(check.name for check in refused)) or 'nothing'}")
    if passed:
        parts.append(f"let through: {', '.join(dict.fromkeys(passed))}")
    return "; ".join(parts)


def _write(path: str, text: str) -> None:
    """Whole or not at all. Raises UserError."""
    part = Path(f"{path}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.lint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("pairs", help="JSON Lines of preference pairs")
    parser.add_argument("--questions", help="JSON Lines of questions with their right answers, for leaks and verdicts")
    parser.add_argument("--kind", choices=[*RULE_KINDS, "free"], help="what the questions' answers are")
    parser.add_argument("--critiques", nargs="+", help="JSON Lines of critiques (id of the question; critique or text)")
    parser.add_argument("--eval", nargs="+", help="JSON Lines of evaluation items that must not stand in the pairs")
    parser.add_argument("--eval-fields", default="", help="columns of the items (default: question, prompt, ...)")
    parser.add_argument("--refuse-above", type=float, default=0.9, help="largest AUC that passes (default 0.9)")
    parser.add_argument("--refuse-share", type=float, default=0.01, help="largest share at fault (default 0.01)")
    parser.add_argument("--allow", action="append", default=[], help=f"let through, by commas: {', '.join(NAMES)}")
    parser.add_argument("--sample", type=int, default=2000, help="pairs looked at for surface features (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and of the five folds (default 0)")
    parser.add_argument("--html", help="write a page for a person to this file")
    parser.add_argument("--json", help="write every number to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
