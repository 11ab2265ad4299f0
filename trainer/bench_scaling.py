"""What ranks, saves, the reference pass and a start cost: `python -m trainer.bench scaling --model DIR --data F`.

Every number comes from real runs of trainer/main.py, started by torchrun, with the same rows in the same global batches
for every number of ranks. The first step is not counted; of the others the median. The reference is scored beforehand,
in this process, and that is timed too. Two runs for each number of ranks: one saves while training waits, the other in
the background, so that steps that a save ran beside can be compared with steps alone.

Ranks on one machine share its cores and memory bandwidth: this measures what sharding costs there, and how memory goes
down, not how a cluster scales.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from data_tools.encode import Group
from data_tools.file_digests import FileDigests
from data_tools.jsonl import read_records
from data_tools.schema import Text
from trainer import checkpoint, dist, numerics
from trainer.config import Config, load_config
from trainer.errors import RunError, UserError
from trainer.loader import Loader
from trainer.metrics import read_metrics
from trainer.models.decoder import Decoder
from trainer.reference_cache import ReferenceCache, row_keys, weights_digest
from trainer.reference_pass import plan_batches, score_batch
from trainer.startup import SCORING_TOKENS, attach_reference, frozen_copy, measured_choices, open_data

MAIN = Path(__file__).parent / "main.py"
SAVE_EVERY = 2
PATIENCE_S = 600.0
"""How long the start of a run may take."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m trainer.bench scaling`."""
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--data", required=True, help="JSON Lines file of pairs")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (default 1 2 4)")
    parser.add_argument("--dtype", default="bf16", choices=["float32", "bf16", "pure_bf16"])
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step, over all ranks")
    parser.add_argument("--steps", type=int, default=7, help="steps, the first of which is not counted; 5 or more")
    parser.add_argument("--max-length", type=int, default=512, help="longer completions are cut")
    parser.add_argument("--tokens-per-microbatch", type=int, default=1280)
    parser.add_argument("--activation-checkpointing", default="none", choices=["none", "full"])
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank")
    parser.add_argument("--startup-pairs", type=int, default=10_000, help="pairs of the start that finds all cached")
    parser.add_argument("--json", help="write the numbers to this file too")


def scaling_bench(args: argparse.Namespace) -> dict[str, object]:
    """Run everything; returns the numbers that the command writes. Raises UserError."""
    if args.steps < 5:
        raise UserError(f"--steps {args.steps}: must be 5 or more: two saves, steps beside them, and one not counted")
    if min(args.ranks) < 1:
        raise UserError(f"--ranks {' '.join(map(str, args.ranks))}: must be 1 or more each")
    numerics.prepare_process()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load_config(settings(args, folder, folder / "run"))
        numerics.set_up(threads=args.threads, deterministic=True, matmul="highest")
        shard, _ = open_data(config)
        if len(shard) < args.pairs * args.steps:
            raise UserError(f"{args.data}: {len(shard)} usable rows, {args.pairs} pairs x {args.steps} steps need more")
        loader = Loader(shard, args.pairs, args.tokens_per_microbatch, config.train.seed)
        cache, model = open_reference(config)
        used = [shard[index] for index in loader.used_indices(args.steps)]
        numbers = score(cache, model, used, config)
        numbers |= {"threads_per_rank": args.threads, "dtype": args.dtype, "pairs": args.pairs}
        for ranks in args.ranks:
            numbers |= {f"ranks_{ranks}/{key}": value for key, value in measure_ranks(args, folder, ranks).items()}
        if 1 in args.ranks:
            ratio = numbers["reference_tokens_per_s"] / numbers["ranks_1/tokens_per_s"]
            numbers["reference_rate_over_training_rate"] = ratio
        numbers["startup_pairs"] = args.startup_pairs
        numbers["startup_s"] = cached_startup_s(args, folder, cache, model)
    return numbers


def settings(args: argparse.Namespace, folder: Path, run_dir: Path, *more: str) -> list[str]:
    """The command line of a run; `more`, such as "train.max_steps=1", wins."""
    config = folder / "bench.toml"
    config.write_text("", encoding="utf-8")
    given = [
        f"model.path={args.model}",
        f"data.train={args.data}",
        f"data.max_length={args.max_length}",
        "data.overlong=truncate_completion",
        f"data.cache_dir={folder / 'data'}",
        "data.lint=false",
        f"reference.cache_dir={folder / 'reference'}",
        f"train.global_batch={args.pairs}",
        f"train.tokens_per_microbatch={args.tokens_per_microbatch}",
        f"train.max_steps={args.steps}",
        f"train.dtype={args.dtype}",
        f"train.activation_checkpointing={args.activation_checkpointing}",
        "kernels.matmul=highest",
        f"checkpoint.every={SAVE_EVERY}",
        "checkpoint.keep_last=1",
        f"run.dir={run_dir}",
        f"run.threads={args.threads}",
        "run.device=cpu",
        "run.tensorboard=off",
        "run.export=false",
        *more,
    ]
    return [str(config), *(f"--{item}" for item in given)]


def open_reference(config: Config) -> tuple[ReferenceCache, Decoder]:
    """The cache that the runs will open, as it is, and the model that fills it."""
    device = dist.choose_device(config.run.device)
    choices = measured_choices(config, device)
    digest = weights_digest(config.model.path, FileDigests(Path(config.reference.cache_dir) / "digests.json"))
    manifest = checkpoint.Manifest(
        step=0, config="", data_digest="", weights_digest=digest, world_size=1, threads=torch.get_num_threads(),
        choices=choices, reference_digest=digest,
    )  # fmt: skip
    cache, _ = attach_reference(config, manifest, [], config.model.path)
    assert cache is not None  # reference.mode is its default, cache
    return cache, frozen_copy(config, config.model.path, str(choices["impl"]))


def score(cache: ReferenceCache, model: Decoder, groups: Sequence[Group], config: Config) -> dict[str, object]:
    """Fill the cache; batches are those of a reference pass, the first is not counted."""
    device, times, tokens = dist.choose_device(config.run.device), [], []
    for batch in plan_batches(groups, SCORING_TOKENS * config.train.tokens_per_microbatch):
        started = time.perf_counter()
        cache.add(score_batch(model, batch, device))
        times.append(time.perf_counter() - started)
        tokens.append(sum(len(group.ids) for group in batch))
    cache.save()
    if len(times) < 2:
        raise UserError(f"all {tokens[0]} tokens fit in one batch of the reference pass: give more --pairs or --steps")
    rates = [count / seconds for count, seconds in zip(tokens[1:], times[1:], strict=True)]
    return {"reference_tokens_per_s": statistics.median(rates), "reference_batches_counted": len(rates)}


def measure_ranks(args: argparse.Namespace, folder: Path, ranks: int) -> dict[str, float]:
    """Steps, memory and saves on so many ranks. Seconds are of the slowest rank, MiB of the fullest."""
    rows = {}
    for name, asynchronous in (("waiting", "false"), ("background", "true")):
        run_dir = folder / f"{name}_{ranks}"
        launch(settings(args, folder, run_dir, f"checkpoint.asynchronous={asynchronous}"), ranks, args.threads)
        rows[name] = read_metrics(run_dir)[1:]
    # the save after step k runs beside step k + 1, and its cost stands in that step's row
    beside = [row for row in rows["background"] if row["step"] % SAVE_EVERY == 1]
    waiting = [row for row in rows["waiting"] if row["step"] % SAVE_EVERY == 1]
    return {
        "tokens_per_s": _median(rows["waiting"], "perf/tokens_per_s"),
        "step_s": _median(rows["waiting"], "perf/step_s"),
        "token_imbalance": _median(rows["waiting"], "perf/token_imbalance"),
        "peak_memory_mib": max(row["perf/peak_memory_mib"] for row in rows["waiting"]),
        "save_waiting_s": _median(waiting, "perf/save_blocked_s"),
        "save_background_blocked_s": _median(beside, "perf/save_blocked_s"),
        "step_beside_a_save_s": _median(beside, "perf/step_s"),
        "peak_memory_background_mib": max(row["perf/peak_memory_mib"] for row in rows["background"]),
    }


def _median(rows: Sequence[dict], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def launch(argv: list[str], ranks: int, threads: int) -> None:
    """A run through torchrun, waited for. Raises RunError with its last line."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*torchrun, str(MAIN), *argv], capture_output=True, text=True, check=False, env=environment(threads)
    )
    if done.returncode:
        own = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "stopped: "))]
        raise RunError(f"{ranks} ranks", (own or done.stderr.splitlines() or ["no output"])[-1])


def environment(threads: int) -> dict[str, str]:
    """torchrun would set one thread a rank; ranks that wait for each other must not spin."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


def cached_startup_s(args: argparse.Namespace, folder: Path, cache: ReferenceCache, model: Decoder) -> float:
    """Seconds from the start of the command to its first step, when data and reference of all pairs are cached.

    The pairs are the file's rows with a number in front of each prompt. Only those of the first step are scored; what
    the other cached rows hold is made up, since it takes as long to find.
    """
    data, run_dir = folder / "many.jsonl", folder / "many"
    write_numbered(args.data, args.startup_pairs, data)
    argv = settings(args, folder, run_dir, f"data.train={data}", "train.max_steps=none")
    config = load_config(argv)
    shard, _ = open_data(config)
    first = Loader(shard, args.pairs, args.tokens_per_microbatch, config.train.seed).step_indices(0)
    device = dist.choose_device(config.run.device)
    for index in first:
        cache.add(score_batch(model, [shard[int(index)]], device))
    for group in shard:
        scored = [sum(stop - start for start, stop in spans) for spans in group.spans[1:]]
        cache.add({key: np.full(count, -1.0, np.float32) for key, count in zip(row_keys(group), scored, strict=True)})
    cache.save()
    started = time.time()
    with open(folder / "startup.out", "w+", encoding="utf-8") as output:
        run = subprocess.Popen(
            [sys.executable, str(MAIN), *argv], stdout=output, stderr=output, env=environment(args.threads)
        )
        try:
            row = first_row(run, run_dir / "metrics.jsonl")
        finally:
            run.kill()  # it would save first if it were asked to end
            run.wait()
        if row is None:
            output.seek(0)
            raise RunError(run_dir, (output.read().splitlines() or ["no output"])[-1])
    return row["time"] - row["perf/step_s"] - started


def first_row(run: subprocess.Popen, metrics: Path) -> dict | None:
    """The first row of metrics of a run, as soon as it is there; None when the run ended without one."""
    deadline = time.monotonic() + PATIENCE_S
    while run.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and (rows := read_metrics(metrics)):
            return rows[0]
        time.sleep(0.05)
    return None


def write_numbered(data: str, count: int, path: Path) -> None:
    """`count` pairs, all different, from the rows of `data` over and over."""
    with path.open("w", encoding="utf-8") as file:
        for number, record in enumerate(islice(cycle(read_records([data], kind="pair")), count)):
            chosen, rejected = map(plain, record.completions)
            row = {"prompt": plain(record.prompt, f"({number}) "), "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


def plain(text: Text, prefix: str = "") -> str | list[dict[str, str]]:
    """A record's text as JSON has it, with something in front of its last message."""
    if isinstance(text, str):
        return prefix + text
    turns = [{"role": message.role, "content": message.content} for message in text]
    return [*turns[:-1], {**turns[-1], "content": prefix + turns[-1]["content"]}] if turns else turns
