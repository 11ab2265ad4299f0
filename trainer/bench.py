"""Time training steps on this machine: `python -m trainer.bench step --model DIR --data F [options] --json OUT`.

The steps are those of a real run (startup, reference cache, optimizer), on the first pairs x steps rows in file order.
The first step is not counted. Numbers of two machines are never comparable; the GEMM limit measured beside them says
how fast this one is at this moment. `python -m trainer.bench scaling` is trainer.bench_scaling,
`predict` trainer.predict.

gflop_floor: what a step cannot do without: 6 x body parameters x unique tokens (forward, and backward twice that; 4 x
where they are frozen under adapters), 6 D V (4 D V) a scored row, and attention over the pairs of tokens that may see
each other.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_tools.encode import Group
from trainer import bench_scaling, numerics, predict
from trainer.batch import scored_tokens
from trainer.config import Config, load_config
from trainer.entry import run_command
from trainer.errors import UserError
from trainer.loader import Loader
from trainer.loop import Run, train_step
from trainer.metrics import peak_memory_mib
from trainer.run_folder import write_file
from trainer.startup import make_run, open_data

GEMM = (2048, 576, 1536)
"""Shape of the product whose speed is called the GEMM limit: (2048, 576) x (576, 1536)."""


@dataclass(frozen=True)
class FileOrderLoader(Loader):
    """Batches in the order of the file, so that every tool compared here sees the same pairs in the same steps."""

    def step_indices(self, step: int) -> np.ndarray:
        start = step * self.global_batch
        return np.arange(start, start + self.global_batch)


def process_age_s() -> float:
    """Seconds since the operating system started this process (Linux: its clock ticks, 10 ms apart)."""
    with open("/proc/self/stat", encoding="ascii") as file:
        start_ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def gemm_limit_gflops(dtype: torch.dtype) -> float:
    """Best of 5 readings of the GEMM shape in `dtype` with all threads, GFLOP/s; each reading is 4 products."""
    rows, inner, columns = GEMM
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    best = float("inf")
    torch.mm(a, b, out=out)
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b, out=out)
        best = min(best, (time.perf_counter() - started) / 4)
    return 2 * rows * inner * columns / best / 1e9


def gflop_floor(run: Run, groups: list[Group], *, score_prompt: bool) -> float:
    """GFLOP that a training step on `groups` needs at least, forward and backward."""
    scored = sum(scored_tokens(group, score_prompt=score_prompt) for group in groups)
    adapters = sum(master.numel() for master in run.masters.masters) if run.config.lora.enabled else 0
    lengths = [group.lengths for group in groups]
    return predict.flop_floor(run.model.config, lengths, scored, adapters=adapters) / 1e9


def weights_mib(run: Run) -> float:
    """MiB of weights, packed weights, masters and moments."""
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    tensors = [*run.model.parameters(), *run.model.buffers(), *run.masters.masters, *moments]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()) / 2**20


def bench_config(args: argparse.Namespace, run_dir: str) -> Config:
    """The configuration of a run that does these steps."""
    argv = [
        str(Path(__file__).parent / "configs" / f"{'dpo' if args.objective == 'dpo' else args.objective}.toml"),
        f"--model.path={args.model}",
        f"--data.train={args.data}",
        f"--data.max_length={args.max_length}",
        "--data.overlong=truncate_completion",
        f"--train.global_batch={args.pairs}",
        f"--train.tokens_per_microbatch={args.tokens_per_microbatch}",
        f"--train.max_steps={args.steps}",
        f"--train.dtype={args.dtype}",
        f"--train.activation_checkpointing={args.activation_checkpointing}",
        f"--kernels.stash={str(args.stash).lower()}",
        f"--kernels.matmul={args.matmul}",
        f"--run.dir={run_dir}",
        "--run.device=cpu",  # so are the GEMM limit and the peak of memory
    ]
    if args.lora:
        argv.append(f"--lora.r={args.lora}")
    if args.quantise != "none":
        argv.append(f"--model.quantise={args.quantise}")
    if args.gguf:
        argv.append(f"--model.gguf={args.gguf}")
    if args.threads is not None:
        argv.append(f"--run.threads={args.threads}")
    if args.objective == "dpo":
        argv.append(f"--reference.mode={args.reference}")
    return load_config(argv)


def step_bench(args: argparse.Namespace) -> dict[str, object]:
    """Run the steps; returns the numbers that the command writes."""
    if args.steps < 2:
        raise UserError(f"--steps {args.steps}: must be 2 or more, since the first step is not counted")
    with tempfile.TemporaryDirectory() as folder:
        config = bench_config(args, folder)
        numerics.prepare_process()
        shard, _ = open_data(config)
        if len(shard) < args.pairs * args.steps:
            raise UserError(f"{args.data}: {len(shard)} usable rows, {args.pairs} pairs x {args.steps} steps need more")
        run = make_run(config, shard, (), None, FileOrderLoader)
        startup = process_age_s()
        walls, cpus, floors, scored, tokens = [], [], [], [], []
        for step in range(args.steps):
            groups = [shard[int(index)] for index in run.loader.step_indices(step)]
            score_prompt = run.objective.scores_prompt
            wall, cpu = time.perf_counter(), time.process_time()
            train_step(run)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            floors.append(gflop_floor(run, groups, score_prompt=score_prompt))
            scored.append(sum(scored_tokens(group, score_prompt=score_prompt) for group in groups))
            tokens.append(sum(len(group.ids) for group in groups))
        peak = peak_memory_mib()
    limit = gemm_limit_gflops(numerics.COMPUTE_DTYPES[args.dtype])
    wall = statistics.mean(walls[1:])
    return {
        "objective": args.objective,
        "dtype": args.dtype,
        "lora_r": args.lora,
        "quantise": args.quantise,
        "trained_parameters": sum(master.numel() for master in run.masters.masters),
        "weights_mib": weights_mib(run),
        "pairs": args.pairs,
        "counted_steps": args.steps - 1,
        "threads": torch.get_num_threads(),
        "pairs_per_s": args.pairs / wall,
        "wall_s_per_step": wall,
        "wall_s_per_step_median": statistics.median(walls[1:]),
        "cpu_s_per_step": statistics.mean(cpus[1:]),
        "peak_rss_mib": peak,
        "scored_tokens": statistics.mean(scored[1:]),
        "stream_tokens": statistics.mean(tokens[1:]),
        "scored_tokens_per_s": statistics.mean(scored[1:]) / wall,
        "stream_tokens_per_s": statistics.mean(tokens[1:]) / wall,
        "gflop_floor": statistics.mean(floors[1:]),
        "gemm_limit_gflops": limit,
        "gemm_share": statistics.mean(floors[1:]) / wall / limit,
        "startup_s": startup,
        "torch": torch.__version__,
    }


def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m trainer.bench", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="training steps: seconds, pairs/s, memory, share of the GEMM limit")
    step.add_argument("--model", required=True, help="Hugging Face model folder")
    step.add_argument("--data", required=True, help="JSON Lines file of pairs")
    step.add_argument("--objective", default="dpo", choices=["dpo", "orpo", "simpo", "sft"])
    step.add_argument("--dtype", default="bf16", choices=["float32", "bf16", "pure_bf16"])
    step.add_argument("--reference", default="cache", choices=["cache", "model"], help="ignored but for dpo")
    step.add_argument("--lora", type=int, default=0, metavar="R", help="adapters of rank R; 0: all weights are trained")
    step.add_argument("--quantise", default="none", choices=["none", "nf4", "gguf"], help="as model.quantise")
    step.add_argument("--gguf", metavar="FILE", help="as model.gguf")
    step.add_argument("--pairs", type=int, default=4, help="pairs a step")
    step.add_argument("--steps", type=int, default=6, help="steps, the first of which is not counted")
    step.add_argument("--max-length", type=int, default=512, help="longer completions are cut")
    step.add_argument("--tokens-per-microbatch", type=int, default=1280)
    step.add_argument("--activation-checkpointing", default="none", choices=["none", "full"])
    step.add_argument("--stash", action="store_true", help="keep the head's logits between forward and backward")
    step.add_argument("--matmul", default="auto", choices=["auto", "highest", "medium"])
    step.add_argument("--threads", type=int)
    step.add_argument("--json", help="write the numbers to this file too")
    scaling = commands.add_parser("scaling", help="ranks, saves, the reference pass, a start that finds all cached")
    bench_scaling.add_arguments(scaling)
    predict.add_arguments(commands.add_parser("predict", help="steps on GPUs that are not here, from published speeds"))
    args = parser.parse_args(argv)
    work = {"step": step_bench, "scaling": bench_scaling.scaling_bench, "predict": predict.prediction_table}
    numbers = work[args.command](args)
    show_numbers(numbers)
    if args.json:
        write_file(args.json, json.dumps(numbers, indent=1) + "\n")


def show_numbers(numbers: Mapping[str, object]) -> None:
    """What a benchmark found, a line each."""
    for name, value in numbers.items():
        print(f"{name:<34} {value:.4g}" if isinstance(value, float) else f"{name:<34} {value}")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
