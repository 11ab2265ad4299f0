"""`python -m eval.main contamination`: are evaluation items in the training data? What counts: `data_tools.overlap`."""

import argparse
import json
import sys
from dataclasses import asdict

from data_tools.errors import UserError
from data_tools.overlap import ITEM_FIELDS, find_overlaps
from trainer.run_folder import ensure_file_writable, write_file


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m eval.main contamination`."""
    parser.add_argument("--train", required=True, action="append", help="JSON Lines of training data; may be repeated")
    parser.add_argument("--eval", required=True, dest="evaluation", help="JSON Lines of evaluation items")
    parser.add_argument("--n", type=int, default=13, help="length of an n-gram in units (default 13)")
    parser.add_argument("--near", type=float, default=0.8, help="share of short grams that counts (default 0.8)")
    parser.add_argument(
        "--unit", choices=["auto", "word", "char"], default="auto", help="what a unit is (default auto)"
    )
    parser.add_argument("--train-fields", default="", help="columns of training rows, by commas (default: all texts)")
    parser.add_argument(
        "--eval-fields", default="", help=f"columns of items (default: first of {', '.join(ITEM_FIELDS)})"
    )
    parser.add_argument("--fail-above", type=float, help="exit code 2 where a larger share of the items is found")
    parser.add_argument("--json", help="write counts and every overlap to this file")


def run(args: argparse.Namespace) -> None:
    """The command. Raises UserError above --fail-above."""
    if args.fail_above is not None and not 0 <= args.fail_above <= 1:
        raise UserError(f"--fail-above {args.fail_above:g}: must be from 0 to 1")
    if args.json:
        ensure_file_writable(args.json)
    found = find_overlaps(
        args.train,
        args.evaluation,
        n=args.n,
        near=args.near,
        unit=args.unit,
        train_fields=[name for name in args.train_fields.split(",") if name],
        eval_fields=[name for name in args.eval_fields.split(",") if name],
    )
    if args.json:
        write_file(args.json, json.dumps({**asdict(found), "share": found.share}, indent=1) + "\n")
    for overlap in found.overlaps[:20]:
        why = f"a run of {overlap.run} of {overlap.units} units, " if overlap.run else ""
        shared = f"{why}{overlap.share:.0%} of short grams"
        print(f"{args.evaluation}:{overlap.line} {overlap.id}: {shared}, {overlap.train}")
    if len(found.overlaps) > 20:
        print(f"... and {len(found.overlaps) - 20} more (--json has all)")
    line = (
        f"{found.contaminated} of {found.items} items found in {found.train_rows} training rows ({found.share:.1%}): "
        f"{found.ngram} by {args.n}-grams, {found.near} near-duplicates; {found.too_short} too short to judge"
    )
    print(line)
    if args.fail_above is not None and found.share > args.fail_above:
        sys.stdout.flush()
        raise UserError(
            f"{args.evaluation}: {found.share:.1%} of its items are in the training data; remove those rows"
        )
