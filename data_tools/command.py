"""What the commands of this package share: subcommands, exit codes, the end of the line of counts."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from data_tools.errors import UserError


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    commands: Mapping[str, Callable[[argparse.Namespace], None]],
) -> int:
    """Does one of the commands; the exit code: 0, or 2 with one line a fault of the input."""
    args = parser.parse_args(argv)
    try:
        commands[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def counted(dropped: Mapping[str, int]) -> str:
    """The end of a line of counts: "; dropped: 3 correct, 1 empty", or nothing."""
    parts = [f"{count} {why}" for why, count in dropped.items() if count]
    return f"; dropped: {', '.join(parts)}" if parts else ""
