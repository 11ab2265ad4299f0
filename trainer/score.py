"""Log-probs of chosen and rejected completions: `python -m trainer.score --model DIR --data F.jsonl --out F.jsonl`.

One row out for each row in, in the same order, without a length limit:
`id, chosen_logps, rejected_logps` (sums in nats), `chosen_tokens, rejected_tokens` (scored tokens),
`chosen_ids, rejected_ids` (the scored ids).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data_tools.chat_template import load_chat_template
from data_tools.encode import SPECIAL_TOKENS, EncodeOptions, Group, encode_records
from data_tools.jsonl import read_records
from data_tools.tokenizer import load_tokenizer
from trainer import dist, losses, numerics
from trainer.batch import build_stream
from trainer.entry import run_command
from trainer.loader import length_sorted_batches
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import load_decoder
from trainer.run_folder import ensure_file_writable, write_file
from trainer.startup import check_vocabulary


@dataclass(frozen=True)
class PairScore:
    """One pair: summed log-probs in nats and the scored token ids."""

    record_id: str
    chosen_logps: float
    rejected_logps: float
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def chosen_mean(self) -> float:
        return self.chosen_logps / len(self.chosen_ids)

    @property
    def rejected_mean(self) -> float:
        return self.rejected_logps / len(self.rejected_ids)


def read_pairs(
    path: str,
    model_dir: str | Path,
    chat_template: str | None = None,
    special_tokens: Literal["text", "control"] = "text",
) -> list[Group]:
    """All pairs of a file as groups, none dropped or cut; special_tokens as data.special_tokens. Raises UserError."""
    model_config = ModelConfig.from_folder(model_dir)
    options = EncodeOptions(kind="pair", max_length=None, special_tokens=special_tokens)
    template = load_chat_template(model_dir, chat_template)
    records = read_records([path], kind="pair")
    groups, report = encode_records(records, load_tokenizer(model_dir), template, options)
    if report.special_line is not None:
        print(report.special_line, file=sys.stderr)
    check_vocabulary(groups, model_config, model_dir)
    return groups


@torch.no_grad()
def score_pairs(model: Decoder, groups: Sequence[Group], *, tokens_per_batch: int = 8192) -> list[PairScore]:
    """Score every pair; results in the order of `groups`."""
    results: dict[int, PairScore] = {}
    for batch in length_sorted_batches(groups, tokens_per_batch):
        stream = build_stream([groups[index] for index in batch])
        token_logps = model(stream.to(model.head_weight.device)).cpu()
        sums = losses.segment_sums(token_logps, stream.score_segments, stream.num_segments).view(-1, 3).tolist()
        ids = iter(torch.split(stream.score_targets, stream.segment_tokens.tolist()))
        for index, (_, chosen, rejected) in zip(batch, sums, strict=True):
            _, chosen_ids, rejected_ids = next(ids), next(ids).tolist(), next(ids).tolist()
            results[index] = PairScore(groups[index].record_id, chosen, rejected, chosen_ids, rejected_ids)
    return [results[index] for index in range(len(groups))]


def rows(scores: Sequence[PairScore]) -> Iterator[dict[str, object]]:
    """Scores as the JSON objects that the command writes."""
    for score in scores:
        yield {
            "id": score.record_id,
            "chosen_logps": score.chosen_logps,
            "rejected_logps": score.rejected_logps,
            "chosen_tokens": len(score.chosen_ids),
            "rejected_tokens": len(score.rejected_ids),
            "chosen_ids": score.chosen_ids,
            "rejected_ids": score.rejected_ids,
        }


def load_for_scoring(model_dir: str | Path, dtype: str) -> Decoder:
    """A frozen model in `dtype` ("float32" or "bf16"), on a GPU where PyTorch finds one, numerics set."""
    numerics.prepare_process()
    numerics.set_up(threads=None, deterministic=True, matmul="highest")
    model = load_decoder(model_dir, dtype=numerics.COMPUTE_DTYPES[dtype]).requires_grad_(False)
    return model.to(dist.choose_device())


def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m trainer.score", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--data", required=True, help="JSON Lines file of pairs (.gz too)")
    parser.add_argument("--out", required=True, help="JSON Lines file to write")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bf16"], help="arithmetic (default float32)")
    parser.add_argument("--chat-template", help="a jinja file used instead of the model's own template")
    parser.add_argument("--special-tokens", choices=SPECIAL_TOKENS, default="text", help="as data.special_tokens")
    args = parser.parse_args(argv)
    ensure_file_writable(args.out)
    groups = read_pairs(args.data, args.model, args.chat_template, args.special_tokens)
    scores = score_pairs(load_for_scoring(args.model, args.dtype), groups)
    write_file(args.out, "".join(json.dumps(row) + "\n" for row in rows(scores)))
    print(f"{len(scores)} pairs scored: {args.out}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
