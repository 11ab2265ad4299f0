"""A file of questions cut into parts that share none: training, development, test, ...

    python -m data_tools.split --questions Q.jsonl --part train=64 --part dev=16 --part test=rest --out-dir parts

Which rows a part gets follows from sha256(seed, id): the same file gives the same parts, and a row more moves few
others. `rest`, once, takes what the others leave. Rows that ask the same (question and options, white space aside)
would stand on both sides of a border, so the first one stays and the others are left out, which is counted. In a part,
rows stand in the order of the file, unchanged. Too few rows for the parts is an error. Nothing is judged here.
"""

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.jsonl import write_rows
from data_tools.pool import read_names
from data_tools.samples import canonical_json

REST = "rest"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    args = _parser().parse_args(argv)
    try:
        parts = dict(_part(text) for text in args.part)
        if len(parts) < len(args.part) or list(parts.values()).count(None) > 1:
            raise UserError("--part: a name stands once, and so does rest")
        rows = read_names(args.questions)
        found, repeats = split(rows, parts, args.seed)
        if found is None:
            asked = sum(count or 0 for count in parts.values())
            problem = f"{len(rows) - repeats} different questions, {asked} are asked for"
            raise UserError(f"{args.questions}: {problem}; make the parts smaller")
        for name, own in found.items():
            write_rows(args.out_dir / f"{name}.jsonl", own)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{len(own)} {name}" for name, own in found.items())
    print(f"{len(rows)} questions ({repeats} repeats left out): {counts} in {args.out_dir}")
    return 0


def split(
    rows: Mapping[str, Mapping[str, Any]], parts: Mapping[str, int | None], seed: int
) -> tuple[dict[str, list[Mapping[str, Any]]] | None, int]:
    """(rows of each part, how many rows ask the same as an earlier one); no parts where there are too few rows.

    rows: by id; parts: how many, None for the rest.
    """
    first: dict[str, str] = {}
    for name, row in rows.items():
        first.setdefault(_asked(row), name)
    names = list(first.values())
    place = {name: number for number, name in enumerate(names)}
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    found: dict[str, list[Mapping[str, Any]]] = {}
    counts = {name: count for name, count in parts.items() if count is not None}
    rest = len(names) - sum(counts.values())
    if rest < 0 or (rest == 0 and None in parts.values()):
        return None, len(rows) - len(names)
    for part, count in parts.items():
        taken = sorted(drawn[: rest if count is None else count], key=place.__getitem__)
        drawn = drawn[len(taken) :]
        found[part] = [rows[name] for name in taken]
    return found, len(rows) - len(names)


def _asked(row: Mapping[str, Any]) -> str:
    """What makes two rows the same question."""
    text = next((row[name] for name in ("question", "text", "prompt") if row.get(name) is not None), None)
    shown = " ".join(text.split()) if isinstance(text, str) else text
    return canonical_json([shown, row.get("options"), row.get("context")])


def _part(text: str) -> tuple[str, int | None]:
    name, _, count = text.partition("=")
    if not name.isidentifier() or not (count == REST or (count.isascii() and count.isdigit() and int(count) > 0)):
        raise UserError(f"--part {text}: expected name=count or name={REST}")
    return name, None if count == REST else int(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.split",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--questions", required=True, help="JSON Lines with ids")
    parser.add_argument("--part", required=True, action="append", help="name=count or name=rest; becomes <name>.jsonl")
    parser.add_argument("--out-dir", required=True, type=Path, help="folder of the parts, each written anew and whole")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
