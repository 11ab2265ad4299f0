"""`python -m trainer.models inspect DIR`: what a model folder holds, and anything suspicious about it.

Exit code 0, also where something looks odd; 2 with one line where config.json cannot be used at all.
"""

import argparse
import sys

from trainer.entry import run_command
from trainer.models.inspection import inspect_model


def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m trainer.models", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="family, parameters, memory for training, tokenizer, anything odd")
    inspect.add_argument("folder", metavar="DIR", help="Hugging Face model folder")
    inspect.add_argument("--weights", action="store_true", help="read the weights too: are all numbers finite?")
    args = parser.parse_args(argv)
    found = inspect_model(args.folder, read_weights=args.weights)
    print("\n".join(found.lines))
    for line in found.odd:
        print(f"suspicious: {line}")
    if not found.odd:
        print("nothing suspicious")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
