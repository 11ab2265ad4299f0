"""So many rows of a JSON Lines file, drawn by a seed: `python -m data_tools.subset --rows F.jsonl --count 500 --out Q`.

Rows are drawn in the order of sha256(seed, id): the same command gives the same rows, and a larger count the same ones
and more. They stay as they are, in the order of the file. `--need explanation` first leaves out rows in which a column
is missing, null or empty. What the rows mean is not checked here: the next command does that.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_tools.command import counted, positive
from data_tools.errors import DataError, UserError, check_each
from data_tools.jsonl import iter_jsonl, write_rows
from data_tools.questions import id_of


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 2 with one line a fault of the input."""
    args = _parser().parse_args(argv)
    try:
        _write(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(args: argparse.Namespace) -> None:
    dropped: Counter[str] = Counter()
    rows = read(args.rows)
    usable = []
    for name, row in rows:
        missing = next((column for column in args.need if row.get(column) in (None, "", [], {})), None)
        if missing is None:
            usable.append((name, row))
        else:
            dropped[f"without {missing}"] += 1
    chosen = drawn([name for name, _ in usable], args.count, args.seed)
    dropped["not drawn"] = len(usable) - len(chosen)
    write_rows(args.out, [row for name, row in usable if name in chosen])
    print(f"{len(rows)} rows: {len(chosen)} in {args.out}{counted(dropped)}")


def read(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(id, row) of every row. Raises DataErrors; an id may stand once."""
    seen: dict[str, int] = {}

    def check(item: tuple[int, object]) -> tuple[str, dict[str, Any]]:
        line, row = item
        if not isinstance(row, dict):
            raise DataError(path, line, field=None, problem=f"expected an object, got {type(row).__name__}")
        name = id_of(row, path, line)
        if (first := seen.setdefault(name, line)) != line:
            raise DataError(path, line, field="id", problem=f"'{name}' already stands in line {first}")
        return name, row

    return check_each(iter_jsonl(path, may_be_empty=True), check)


def drawn(names: Sequence[str], count: int | None, seed: int) -> set[str]:
    """`count` of the names (None, or more than there are: all)."""
    if count is None:
        return set(names)
    return set(sorted(names, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).hexdigest())[:count])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.subset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", required=True, help="JSON Lines with id")
    parser.add_argument("--count", type=positive, help="rows drawn (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="which rows (default 0)")
    parser.add_argument("--need", nargs="+", default=[], metavar="COLUMN", help="only rows that have these")
    parser.add_argument("--out", required=True, help="JSON Lines, written anew and whole")
    return parser


if __name__ == "__main__":
    sys.exit(main())
