"""Explain a file of reference log-probs: `python -m trainer.reference --check FILE [--model DIR [--data F ...]]`.

Says what the file's header means, how much is in it and whether it is whole. With --model: whether these weights made
it. With --data too: how many of the rows' completions it holds; a few of them are scored again and compared.
Exit code 0 when all is well, 2 with one line when the file is damaged or belongs to something else.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data_tools.chat_template import load_chat_template
from data_tools.encode import OVERLONG, SPECIAL_TOKENS, EncodeOptions, Group, encode_records
from data_tools.file_digests import FileDigests
from data_tools.jsonl import read_records
from data_tools.tokenizer import load_tokenizer
from kernels.dispatch import resolve
from trainer import dist, numerics
from trainer.config_sections import DataConfig, section_defaults
from trainer.entry import run_command
from trainer.errors import RunError, UserError
from trainer.lora import add_lora
from trainer.lora_files import adapter_digest, load_adapter, read_settings
from trainer.models.attention_form import choose_form
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import load_decoder
from trainer.reference_cache import FORMAT, Header, differing_fields, read_cache_file, row_keys, weights_digest
from trainer.reference_pass import score_batch
from trainer.startup import check_vocabulary

Rows = dict[bytes, np.ndarray]

MEANING = {
    "weights": "sha256 of the model's config.json and weight files",
    "dtype": "arithmetic of the model that scored",
    "kernel": "implementation of the operators",
    "attention": "form of attention",
    "quantisation": "of the weights",
    "format": "version of the file",
}


def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    data = section_defaults(DataConfig)
    parser = argparse.ArgumentParser(prog="python -m trainer.reference", description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", required=True, type=Path, metavar="FILE", help="the cache file")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder of the reference")
    parser.add_argument("--adapter", metavar="DIR", help="adapter of the reference, where a run went on from one")
    parser.add_argument("--data", nargs="+", metavar="F", help="JSON Lines files of pairs (.gz too)")
    parser.add_argument("--max-length", type=int, default=data["max_length"], help="as data.max_length of the run")
    parser.add_argument("--overlong", choices=OVERLONG, default=data["overlong"], help="as data.overlong of the run")
    parser.add_argument("--chat-template", metavar="F", help="as data.chat_template of the run")
    parser.add_argument(
        "--special-tokens", choices=SPECIAL_TOKENS, default=data["special_tokens"], help="as data.special_tokens"
    )
    parser.add_argument("--rescore", type=int, default=4, metavar="N", help="pairs to score again (default 4)")
    args = parser.parse_args(argv)
    if args.data and not args.model:
        raise UserError("--data: the tokenizer is in the model's folder; give --model too")
    header, rows = open_whole(args.check)
    for line in describe(args.check, header, rows):
        print(line)
    if args.model:
        check_weights(args.check, header, args.model, args.adapter)
        print(f"model {args.model}: its weights made this file")
    if args.data:
        options = EncodeOptions("pair", args.max_length, args.overlong, args.chat_template, args.special_tokens)
        held = find_held(read_groups(args.data, args.model, options), rows)
        if held and args.rescore:
            rescore(args.check, header, args.model, args.adapter, held[:: -(-len(held) // args.rescore)], rows)


def open_whole(path: Path) -> tuple[Header, Rows]:
    """A cache file's header and rows. Raises RunError unless the file is whole and of this version's format."""
    try:
        fields, rows = read_cache_file(path)
        return Header(**{name: str(value) for name, value in fields.items()}), rows
    except (ValueError, TypeError) as error:
        problem = "no such file" if not path.exists() else f"is not a whole reference cache ({error})"
        raise RunError(path, f"{problem}; without it a run scores its rows again") from None


def describe(path: Path, header: Header, rows: Rows) -> list[str]:
    """What a whole file is and holds, in lines of text."""
    lengths = np.array([len(row) for row in rows.values()], dtype=np.int64)
    total = float(sum(row.sum(dtype=np.float64) for row in rows.values()))
    bad = sum(not np.isfinite(row).all() for row in rows.values())
    tokens = int(lengths.sum())
    return [
        f"{path}: reference log-probs, float32 nats a scored token",
        *(f"  {name:13}{value}  ({MEANING[name]})" for name, value in vars(header).items()),
        f"  {'completions':13}{len(rows)}, of them with non-finite numbers: {bad}",
        f"  {'tokens':13}{tokens}, longest {lengths.max(initial=0)}, mean log-prob {total / max(1, tokens):.4f}",
        f"  {'size':13}{path.stat().st_size / 2**20:.1f} MiB, checksum right",
    ]


def check_weights(path: Path, header: Header, model_dir: str, adapter: str | None) -> None:
    """Raise RunError, naming the fields that differ, unless the weights in `model_dir`, with the adapter, made the
    file."""
    with tempfile.TemporaryDirectory() as memo:  # digests are not remembered: a check reads the weights themselves
        digests = FileDigests(Path(memo) / "digests.json")
        digest = weights_digest(model_dir, digests)
        digest = digest if adapter is None else adapter_digest(adapter, digest, digests)
    wanted = replace(header, weights=digest, format=FORMAT)  # the rest is the run's choice, not the folder's
    if differing := differing_fields(vars(header), wanted):
        raise RunError(path, f"does not belong to {model_dir} ({differing}); a run with this model leaves it alone")


def read_groups(files: Sequence[str], model_dir: str, options: EncodeOptions) -> list[Group]:
    """The pairs of `files` as a run encodes them; prints what became of the rows. Raises UserError."""
    template = load_chat_template(model_dir, options.chat_template)
    records = read_records(files, kind="pair")
    groups, report = encode_records(records, load_tokenizer(model_dir), template, options)
    for line in report.lines():
        print(f"  {line}")
    check_vocabulary(groups, ModelConfig.from_folder(model_dir), model_dir)
    return groups


def find_held(groups: Sequence[Group], rows: Rows) -> list[Group]:
    """Groups whose completions are all in the file; prints how much of the data it holds."""
    keys = [row_keys(group) for group in groups]
    wanted = {key for own in keys for key in own}
    found = sum(key in rows for key in wanted)
    print(f"data: the file holds {found} of {len(wanted)} completions; a run scores the other {len(wanted) - found}")
    return [group for group, own in zip(groups, keys, strict=True) if all(key in rows for key in own)]


def rescore(
    path: Path, header: Header, model_dir: str, adapter: str | None, groups: Sequence[Group], rows: Rows
) -> None:
    """Score groups again, each alone, and compare. Raises RunError where numbers differ by more than rounding."""
    device = dist.choose_device()
    model = load_as(path, header, model_dir, adapter, device)
    fresh = {key: row for group in groups for key, row in score_batch(model, [group], device).items()}
    gaps = np.concatenate([np.abs(row - rows[key]) for key, row in fresh.items()])
    # as at step 0 of a run: single bf16 numbers scatter, their mean does not
    exact = header.dtype == "float32"
    allowed = numerics.STEP0_TOLERANCE[torch.float32 if exact else torch.bfloat16]
    judged = gaps.max() if exact else gaps.mean()
    text = f"differ by at most {gaps.max():.2e} nats a token, {gaps.mean():.2e} on average"
    if not judged <= allowed:
        kind = "at most" if exact else "on average"
        raise RunError(path, f"rows scored again {text} (allowed: {kind} {allowed:.0e}); delete the file")
    print(f"{len(fresh)} completions scored again: {text}")


def load_as(path: Path, header: Header, model_dir: str, adapter: str | None, device: torch.device) -> Decoder:
    """The model with the header's arithmetic. Raises RunError where this machine does not have it."""
    if header.quantisation != "none":
        raise RunError(path, f"its weights were quantised ({header.quantisation}); only a run scores them; no --data")
    try:
        impl = resolve(header.kernel, device)
        form = choose_form("blocks" if header.attention == Header.attention else header.attention, device)
    except ValueError as error:
        raise RunError(path, f"its rows cannot be scored again here ({error}); leave out --data") from None
    numerics.prepare_process()
    numerics.set_up(threads=None, deterministic=True, matmul="highest")
    dtype = torch.float32 if header.dtype == "float32" else torch.bfloat16
    model = load_decoder(model_dir, dtype=dtype)
    if adapter is not None:
        add_lora(model, read_settings(adapter), dtype=dtype)
        load_adapter(model, adapter)
    model = model.requires_grad_(False).to(device)
    model.kernel_impl, model.attention_form = impl, form
    return model


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
