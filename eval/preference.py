"""Held-out pairs before and after training: `python -m eval.preference --before DIR --after DIR --data F`.

Reward accuracy: share of pairs whose log-prob gain over the starting model is larger for chosen than for rejected (a
tie is wrong). Policy share: pairs whose mean log-prob a token is higher for chosen, which needs no reference at all.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.encode import SPECIAL_TOKENS
from eval.stats import wilson_interval
from trainer.entry import run_command
from trainer.errors import RunError
from trainer.metrics import read_metrics
from trainer.models.config import ModelConfig
from trainer.run_folder import ensure_file_writable, write_file
from trainer.score import PairScore, load_for_scoring, read_pairs, score_pairs
from trainer.startup import check_vocabulary


def compare(before: Sequence[PairScore], after: Sequence[PairScore]) -> dict[str, float]:
    """Numbers of the table; both lists score the same pairs in the same order, `before` by the reference."""
    count = len(before)
    gains = [
        (a.chosen_logps - b.chosen_logps, a.rejected_logps - b.rejected_logps)
        for b, a in zip(before, after, strict=True)
    ]
    correct = sum(chosen > rejected for chosen, rejected in gains)
    low, high = wilson_interval(correct, count)
    return {
        "pairs": count,
        "reward_accuracy": correct / count,
        "reward_accuracy_low": low,
        "reward_accuracy_high": high,
        "logratio_margin": sum(chosen - rejected for chosen, rejected in gains) / count,
        "policy_share_before": sum(s.chosen_mean > s.rejected_mean for s in before) / count,
        "policy_share_after": sum(s.chosen_mean > s.rejected_mean for s in after) / count,
        "margin_before": sum(s.chosen_logps - s.rejected_logps for s in before) / count,
        "margin_after": sum(s.chosen_logps - s.rejected_logps for s in after) / count,
        "chosen_logps_before": sum(s.chosen_logps for s in before) / count,
        "chosen_logps_after": sum(s.chosen_logps for s in after) / count,
    }


def read_run(folder: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics. Raises RunError where there is none."""
    rows = read_metrics(folder)
    if not rows:
        raise RunError(folder, "its metrics.jsonl has no row; name the folder of a run that trained")
    return rows


def table(numbers: dict[str, float], rows: Sequence[Mapping[str, Any]], model: str) -> str:
    """The numbers as aligned text; `rows`: metrics of the training, which tell speed and memory (none: left out)."""
    n = numbers
    interval = f"95% interval {n['reward_accuracy_low']:.3f} to {n['reward_accuracy_high']:.3f}"
    shares = f"{n['policy_share_before']:.3f}", f"{n['policy_share_after']:.3f}"
    lines = [
        ("held-out pairs", f"{n['pairs']:.0f}", ""),
        ("", "before", "after"),
        ("reward accuracy", "", f"{n['reward_accuracy']:.3f}  ({interval})"),
        ("chosen likelier, mean log-prob a token", *shares),
        ("log-prob chosen - rejected, nats", f"{n['margin_before']:.2f}", f"{n['margin_after']:.2f}"),
        ("log-prob of chosen, nats", f"{n['chosen_logps_before']:.2f}", f"{n['chosen_logps_after']:.2f}"),
    ]  # fmt: skip
    if rows:
        speeds = sorted(row["perf/pairs_per_s"] for row in rows)
        lines += [
            ("training steps", "", f"{rows[-1]['step']:.0f}"),
            ("training pairs a second (median)", "", f"{speeds[len(speeds) // 2]:.2f}"),
            ("peak memory of training, MiB", "", f"{max(row['perf/peak_memory_mib'] for row in rows):.0f}"),
        ]
    lines.append(("model", "", model))
    return "\n".join(f"{name:<46}{left:>10}  {right}" for name, left, right in lines)


def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m eval.preference", description=__doc__, allow_abbrev=False)
    parser.add_argument("--before", required=True, help="the starting model's folder, also the reference")
    parser.add_argument("--after", required=True, help="the trained model's folder")
    parser.add_argument("--data", required=True, help="held-out pairs, JSON Lines")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--special-tokens", default="text", choices=SPECIAL_TOKENS, help="as data.special_tokens")
    parser.add_argument("--run", help="run folder: adds speed and memory of the training")
    parser.add_argument("--json", help="write the numbers to this file too")
    args = parser.parse_args(argv)
    rows = read_run(args.run) if args.run else []
    if args.json:
        ensure_file_writable(args.json)
    groups = read_pairs(args.data, args.before, special_tokens=args.special_tokens)
    check_vocabulary(groups, ModelConfig.from_folder(args.after), args.after)
    before = score_pairs(load_for_scoring(args.before, args.dtype), groups)
    after = score_pairs(load_for_scoring(args.after, args.dtype), groups)
    numbers = compare(before, after)
    print(table(numbers, rows, args.after))
    if args.json:
        write_file(args.json, json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
