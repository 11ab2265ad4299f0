"""Work an adapter into its base model: `python -m trainer.merge --model DIR --adapter DIR --out DIR`.

Writes a Hugging Face folder: sums in float32, rounded once to the dtype of the base's files, one tensor in memory at a
time. A run does the same at its end (lora.merge). The adapter is one in PEFT's format, ours or theirs.
"""

import argparse
import sys
from pathlib import Path

from trainer.entry import run_command
from trainer.errors import ModelError
from trainer.lora_files import RewardHead, export_merged, merged_entries, read_head, read_settings, read_tensors
from trainer.prm import read_table


def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m trainer.merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder of the base")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder of the adapter")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not exist")
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        raise ModelError(args.out, "exists already; delete it or name another folder")
    settings = read_settings(args.adapter)
    adapter = read_tensors(args.adapter, settings)
    if not adapter:
        raise ModelError(args.adapter, "has no tensors to merge")
    shapes = {layer: (len(own.B), own.A.shape[1]) for layer, own in adapter.items()}
    merged_entries(args.model, shapes)
    Path(args.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    table = read_table(args.adapter)
    head = RewardHead(read_head(args.adapter), None if table is None else table.as_json())
    export_merged(adapter, settings, source=args.model, folder=Path(args.out), head=head)
    print(f"merged {len(adapter)} layers (rank {settings.r}, scaling {settings.scaling:g}): {args.out}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
