"""Tokens a second of `eval.generate`, beside transformers' generate where that is installed.

    python -m eval.bench --model DIR --prompts P.jsonl --batch 16 --tokens 128 --dtype bf16 --json out.json

Each side runs in a process of its own, in turn, `--repeats` times; medians are shown. Both draw the likeliest token,
`--tokens` of them for each prompt, ends ignored, once before the clock runs and once more by it. CPU time and peak
memory are those of the process and of those that it forks, pages that they share counted once; such memory is read
while the clock does not run, for that takes 5 ms a process each time. Threads that wait sleep on both sides, unless the
environment variable OMP_WAIT_POLICY says otherwise. With `--parity` both run once more in float32 and their tokens are
compared: a difference counts where their two best logits are not within 1e-4.
Numbers of two machines are never comparable.
"""

import argparse
import importlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from data_tools.chat_template import load_chat_template
from data_tools.encode import encode_prompts
from data_tools.samples import messages_of, read_prompts
from data_tools.schema import Message, Record
from data_tools.tokenizer import load_tokenizer
from eval.generate import Request, generate
from eval.sampling import SamplingOptions
from trainer import numerics
from trainer.bench import show_numbers
from trainer.entry import run_command
from trainer.errors import RunError, UserError
from trainer.metrics import peak_memory_mib
from trainer.models.hf_weights import load_decoder
from trainer.models.packed import pack_for_sampling
from trainer.run_folder import write_file

WAIT_POLICY = "OMP_WAIT_POLICY"
EVERY_S = 0.5
NEAR = 1e-4
"""Two logits that are no further apart may come in either order."""


def prompt_ids(args: argparse.Namespace) -> list[list[int]]:
    """The first `--batch` prompts as chats, in tokens. Raises UserError where there are fewer."""
    prompts = read_prompts(args.prompts)[: args.batch]
    if len(prompts) < args.batch:
        raise UserError(f"{args.prompts}: {len(prompts)} prompts, --batch {args.batch} needs more")
    template = load_chat_template(args.model)
    records = []
    for prompt in prompts:
        text = prompt.prompt
        if template is not None:
            text = tuple(Message(**message) for message in messages_of(text))
        records.append(Record(id=prompt.id, prompt=text, completions=(), path=prompt.path, line=prompt.line))
    return encode_prompts(records, load_tokenizer(args.model), template)


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and tokens of `eval.generate`."""
    numerics.prepare_process()
    numerics.set_up(threads=args.threads, deterministic=True, matmul="highest")
    ids, tokenizer = prompt_ids(args), load_tokenizer(args.model)
    model = load_decoder(args.model, dtype=numerics.COMPUTE_DTYPES[args.dtype]).requires_grad_(False)
    pack_for_sampling(model)
    requests = [Request(str(index), tuple(own)) for index, own in enumerate(ids)]
    options = SamplingOptions(max_tokens=args.tokens, temperature=0)
    with FamilyMemory() as memory:
        if not args.parity_run:
            list(generate(model, tokenizer, requests, options, slots=args.batch))
    wall, cpu = time.perf_counter(), cpu_seconds()
    drawn = generate(model, tokenizer, requests, options, slots=args.batch)
    done = {each.request_id: each.token_ids for each in drawn}
    reading = _reading(wall, cpu, args, [done[request.id] for request in requests], [])
    return reading | {"peak_rss_mib": max(reading["peak_rss_mib"], memory.most_mib)}


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    """The same of transformers, padded on the left."""
    transformers = importlib.import_module("transformers")  # an oracle, never needed
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    ids, dtype = prompt_ids(args), numerics.COMPUTE_DTYPES[args.dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    longest = max(map(len, ids))
    tokens, mask = (torch.zeros(len(ids), longest, dtype=torch.int64) for _ in range(2))
    for row, own in enumerate(ids):
        tokens[row, longest - len(own) :] = torch.tensor(own)
        mask[row, longest - len(own) :] = 1
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    if args.parity_run:
        options |= {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        if not args.parity_run:
            model.generate(tokens, max_new_tokens=args.tokens, **options)
        wall, cpu = time.perf_counter(), cpu_seconds()
        out = model.generate(tokens, max_new_tokens=args.tokens, **options)
    gaps = []
    if args.parity_run:
        best = torch.stack(out.logits, 1).topk(2, dim=-1).values
        gaps, out = (best[..., 0] - best[..., 1]).tolist(), out.sequences
    return _reading(wall, cpu, args, [row[longest:].tolist() for row in out], gaps)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    own, children = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


class FamilyMemory(threading.Thread):
    """Looks every `EVERY_S` at the memory of this process and its children: pages that they share counted once, and
    the mapped files of the one that has most of them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most_mib = 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(EVERY_S):
            self.look()

    def look(self) -> None:
        """Once, now."""
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
        own, files = zip(*map(_memory_mib, ["self", *children]), strict=True)
        self.most_mib = max(self.most_mib, sum(own) + max(files))

    def __enter__(self) -> "FamilyMemory":
        if Path("/proc/self/smaps_rollup").exists():
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.is_alive():
            self.join()


def _memory_mib(process: str) -> tuple[float, float]:
    """Its share of memory that is no file's, and the files' pages that it has in memory: others, which are not of the
    family, may have them too, so that a share of those would be too little."""
    try:
        parts = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
        parts += Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # it has just ended
        return 0.0, 0.0
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in parts) if "kB" in rest}
    return (kib.get("Pss_Anon", 0) + kib.get("Pss_Shmem", 0)) / 2**10, kib.get("RssFile", 0) / 2**10


def _reading(
    wall: float, cpu: float, args: argparse.Namespace, ids: list[list[int]], gaps: list[list[float]]
) -> dict[str, Any]:
    seconds = time.perf_counter() - wall
    return {
        "tokens_per_s": args.batch * args.tokens / seconds,
        "wall_s": seconds,
        "cpu_s": cpu_seconds() - cpu,
        "peak_rss_mib": peak_memory_mib(),
        "ids": ids,
        "gaps": gaps,
    }


def environment() -> dict[str, str]:
    """Of both sides: with threads that sleep while they wait, as in trainer.bench_scaling and the Makefile."""
    return {WAIT_POLICY: "passive"} | os.environ


def in_child(side: str, argv: list[str], *more: str) -> dict[str, Any]:
    """A reading of one side in a process of its own. Raises RunError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "reading.json"
        command = [sys.executable, "-m", "eval.bench", *argv, "--side", side, "--json", str(out), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
        if done.returncode:
            raise RunError(side, f"its process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def compare(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, int]:
    """Of greedy tokens in float32: prompts that agree, that part at a near tie, and that part elsewhere."""
    found = {"equal": 0, "near_ties": 0, "different": 0}
    for own, expected, gaps in zip(mine["ids"], other["ids"], other["gaps"], strict=True):
        parted = next((step for step, pair in enumerate(zip(own, expected, strict=True)) if pair[0] != pair[1]), None)
        kind = "equal" if parted is None else "near_ties" if gaps[parted] < NEAR else "different"
        found[kind] += 1
    return found


def bench(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """All readings, in turn."""
    sides = ["ours"] + (["theirs"] if importlib.util.find_spec("transformers") is not None else [])
    readings: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(args.repeats):
        for side in sides:
            readings[side].append(in_child(side, argv))
    result: dict[str, Any] = {"dtype": args.dtype, "batch": args.batch, "tokens": args.tokens}
    for side, own in readings.items():
        for name in ("tokens_per_s", "cpu_s", "peak_rss_mib"):
            result[f"{side}_{name}"] = statistics.median(reading[name] for reading in own)
    if "theirs" in sides:
        result["times_theirs"] = result["ours_tokens_per_s"] / result["theirs_tokens_per_s"]
        if args.parity:
            exact = [in_child(side, argv, "--dtype", "float32", "--parity-run") for side in sides]
            result |= {f"parity_{name}": value for name, value in compare(*exact).items()}
    result |= {"threads": args.threads or torch.get_num_threads(), WAIT_POLICY: environment()[WAIT_POLICY]}
    result["torch"] = torch.__version__
    return result


def main(argv: list[str]) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--prompts", required=True, help="JSON Lines with prompt or messages")
    parser.add_argument("--batch", type=int, default=16, help="prompts at a time (default 16)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a prompt (default 128)")
    parser.add_argument("--dtype", choices=["bf16", "float32"], default="bf16")
    parser.add_argument("--repeats", type=int, default=3, help="of each side (default 3)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parity", action="store_true", help="compare greedy tokens in float32 too")
    parser.add_argument("--json", help="write the numbers to this file too")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--parity-run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side is not None:
        numbers = ours(args) if args.side == "ours" else theirs(args)
    else:
        numbers = bench(args, argv)
        show_numbers(numbers)
    if args.json:
        write_file(args.json, json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
