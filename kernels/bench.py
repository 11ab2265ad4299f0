"""`python -m kernels.bench`: what each way to each operator costs and how exact it is, on this device.

    python -m kernels.bench [--op linear_logps ...] [--device cpu|cuda] [--json F] [--compare F]

Every row runs in a process of its own, one after another. Its time is the median of forward and backward together, over
inputs that take turns so that none of them is still in the cache. Between the repeats the device's ceiling is read, in
the same process: a bare product, or a copy of memory where the operator has no product; `share` is a share of it. Peak
memory is what forward and backward add to the inputs, gradients included. Errors are against float64 on the first rows:
the largest of the values, and of the gradients relative to the largest entry. A way that cannot run here reads n/a.

Numbers of two devices are never compared: a file of another device is refused by --compare. On a machine that others
use, read a CPU by `--threads 1 --clock cpu`. Not a test: nothing here fails.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.bench_cases import OPERATORS, Function, Operator, Sizes, Variant, shape_words, variants
from kernels.bench_meter import cache_bytes, ceiling, device_name, keep_freed, peak_mib, stopwatch, synchronize

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_SIZES = {"cpu": Sizes(1024, 576, 49152), "cuda": Sizes(8192, 2048, 128256)}
SETTINGS = ("dtype", "rows", "width", "vocab", "matmul", "clock", "threads")
"""What must be equal, beside the device, where two files are compared."""
ROOT = Path(__file__).resolve().parent.parent
ERROR_ROWS = 64
OTHER_NAMES = {"logps_from_logits": "logits_logps", "swiglu": "swiglu_linear", "geglu": "geglu_linear"}
"""Functions of the package by the row that measures them."""
MOST_SETS = 256
"""Of inputs that take turns."""
HEAD = f"{'':30}{'error':>9}{'grad err':>9}{'ms':>10}{'speed':>17}{'share':>7}{'MiB':>8}"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.row is not None:
        print(json.dumps(measure(*options.row, options)))
        return 0
    about = describe(options)
    try:
        older = read_older(options.compare, about) if options.compare else {}
        ways = {op: variants(op, DTYPES[options.dtype], torch.device(options.device)) for op in options.op}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['dtype']}")
    readings = []
    for op, found in ways.items():
        print(f"\n{op}: {shape_words(op, sizes_of(options))}\n{HEAD}")
        for variant in found:
            row = run_row(op, variant, arguments)
            print(row_words(row, older.get((op, variant.name))), flush=True)
            readings.append(row)
    if options.json:
        Path(options.json).write_text(json.dumps({**about, "readings": readings}, indent=1) + "\n")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--op",
        nargs="+",
        type=lambda name: OTHER_NAMES.get(name, name),
        choices=list(OPERATORS),
        default=list(OPERATORS),
        help="default: all",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU, where there is one")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--rows", type=int, help="tokens (default 1024, on a GPU 8192)")
    parser.add_argument("--width", type=int, help="width of the hidden states (default 576, on a GPU 2048)")
    parser.add_argument("--vocab", type=int, help="vocabulary (default 49152, on a GPU 128256)")
    parser.add_argument("--matmul", choices=["highest", "medium"], default="highest", help="float32 products")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the CPU (default: what torch takes)")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: time of the process, all threads"
    )
    parser.add_argument("--json", help="write the readings to this file")
    parser.add_argument("--compare", help="beside each row, what a file of --json says, read on this very device")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)  # how a row's own process is told what to measure
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; use cpu")
    if options.device == "cuda" and options.clock == "cpu":
        parser.error("--clock cpu: a GPU is timed by its own events; leave it out")
    defaults = DEFAULT_SIZES[options.device]
    for name in ("rows", "width", "vocab"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(defaults, name))
    for name in ("rows", "width", "vocab", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.json and (Path(options.json).is_dir() or not Path(options.json).parent.is_dir()):
        parser.error(f"--json {options.json}: must be a file in a folder that exists")
    if options.width % 2:
        parser.error(f"--width {options.width}: must be even, rope turns pairs")
    return options


def sizes_of(options: argparse.Namespace) -> Sizes:
    return Sizes(options.rows, options.width, options.vocab)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What a file of readings says about all of them."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings["threads"] = options.threads or torch.get_num_threads()
    device = device_name(torch.device(options.device))
    return {"device": device, "torch": torch.__version__, "triton": triton, **settings}


def read_older(path: str, about: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The readings of a file of --json. Raises ValueError unless device and settings are those of `about`."""
    try:
        older = json.loads(Path(path).read_text())
        readings = {(row["op"], row["variant"]): row for row in older["readings"]}
        device, *settings = (older[name] for name in ("device", *SETTINGS))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--compare {path}: not a file that --json wrote ({error})") from None
    if device != about["device"]:
        raise ValueError(
            f"--compare {path}: read on {device}, this is {about['device']}: numbers of two devices are not comparable"
        )
    for name, value in zip(SETTINGS, settings, strict=True):
        if value != about[name]:
            raise ValueError(f"--compare {path}: {name} is {value} there and {about[name]} here; measure alike")
    return readings


def run_row(op: str, variant: Variant, arguments: list[str]) -> dict[str, Any]:
    """Measure one row in a fresh process."""
    name = {"op": op, "variant": variant.name}
    if variant.missing:
        return {**name, "not_available": variant.missing}
    command = [sys.executable, "-m", "kernels.bench", *arguments, "--row", op, variant.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {**name, "failed": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return {**name, **json.loads(done.stdout.splitlines()[-1])}


def measure(op: str, variant_name: str, options: argparse.Namespace) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul)
    torch.manual_seed(0)
    dtype, device, sizes = DTYPES[options.dtype], torch.device(options.device), sizes_of(options)
    operator = OPERATORS[op]
    (variant,) = (found for found in variants(op, dtype, device) if found.name == variant_name)
    sets = input_sets(operator, variant, sizes, dtype, device)
    function, note = variant.make(sets[0])
    error, gradient_error = errors(function, operator, sets[0], variant.trained > 0)
    with torch.set_grad_enabled(variant.trained > 0):
        results = as_tuple(function(*sets[0]))
    rounds = [
        partial(step, function, inputs, [torch.randn_like(result) for result in results] if variant.trained else None)
        for inputs in sets
    ]
    del results
    peak = peak_mib(rounds[0], device)
    keep_freed()
    rounds[0]()
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds, best_speed = timings(rounds, ceiling(device, dtype, operator.is_gemm), options.repeats, device, clock)
    work = operator.work(sizes) * variant.times * (1 if operator.is_gemm else dtype.itemsize)
    return {
        "max_error": error,
        "gradient_error": gradient_error,
        "milliseconds": seconds * 1e3,
        "speed": work / seconds / (1e12 if operator.is_gemm else 1e9),
        "unit": "TFLOP/s" if operator.is_gemm else "GB/s",
        "share": work / seconds / best_speed,
        "peak_mib": peak,
        "input_sets": len(sets),
        "note": note,
    }


def input_sets(
    operator: Operator, variant: Variant, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> list[list[Tensor]]:
    """So many that they take up twice the cache: before the turn of one comes again, the others have been there."""
    inputs = operator.make(sizes, device)
    size = sum(tensor.numel() for tensor in inputs) * dtype.itemsize
    number = min(MOST_SETS, -(-2 * cache_bytes(device) // size))
    sets = [inputs, *(operator.make(sizes, device) for _ in range(number - 1))]
    for inputs in sets:
        for index in range(operator.trained):
            inputs[index] = inputs[index].to(dtype).requires_grad_(index < variant.trained)
    return sets


def step(function: Function, inputs: list[Tensor], upstream: list[Tensor] | None) -> None:
    """Forward, and backward where there is an upstream gradient."""
    with torch.set_grad_enabled(upstream is not None):
        results = as_tuple(function(*inputs))
    if upstream is not None:
        torch.autograd.backward(results, upstream)
        for leaf in inputs:
            leaf.grad = None


def timings(
    rounds: list[Callable[[], None]],
    limit: tuple[Callable[[], object], float],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """(median seconds of a round, the most that the ceiling's function did a second), read in turn."""
    time_of = stopwatch(device, clock)
    most, work = limit
    readings = [(time_of(most), time_of(rounds[index % len(rounds)])) for index in range(repeats + 1)]
    synchronize(device)
    ceilings, times = zip(*((of_most(), of_round()) for of_most, of_round in readings[1:]), strict=True)
    return statistics.median(times), work / min(ceilings)


def errors(function: Function, operator: Operator, inputs: list[Tensor], gradient: bool) -> tuple[float, float | None]:
    """(largest error of the values, largest error of a gradient relative to its largest entry) against float64.

    On the first rows only: float64 results of all would be the largest thing here. The function itself runs on all
    rows, with an upstream gradient that is 0 elsewhere.
    """
    rows = min(ERROR_ROWS, len(inputs[operator.by_row[0]]))
    exact_inputs = [
        widened(tensor[:rows] if index in operator.by_row else tensor) for index, tensor in enumerate(inputs)
    ]
    exact = as_tuple(operator.plain(*exact_inputs))
    with torch.set_grad_enabled(gradient):
        found = as_tuple(function(*inputs))
    error = max(largest(one[:rows].detach() - other.detach()) for one, other in zip(found, exact, strict=True))
    if not gradient:
        return error, None
    upstream = [torch.randn_like(result) for result in found]
    for tensor in upstream:
        tensor[rows:] = 0
    wanted = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
    grads = torch.autograd.grad(found, [inputs[index] for index in wanted], upstream)
    exact_upstream = [tensor[:rows].double() for tensor in upstream]
    exact_grads = torch.autograd.grad(exact, [exact_inputs[index] for index in wanted], exact_upstream)
    pairs = zip(wanted, grads, exact_grads, strict=True)
    return error, max(
        largest((one[:rows] if index in operator.by_row else one) - other) / largest(other)
        for index, one, other in pairs
    )


def as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def largest(values: Tensor) -> float:
    return float(values.detach().abs().max())


def widened(tensor: Tensor) -> Tensor:
    """A float64 copy that is a leaf; integers as they are."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


def row_words(row: dict[str, Any], older: dict[str, Any] | None = None) -> str:
    name = f"{row['variant']:30}"
    for reason in ("not_available", "failed"):
        if reason in row:
            return f"{name}{'n/a' if reason == 'not_available' else 'failed'} ({row[reason]})"
    gradient, peak = row["gradient_error"], row["peak_mib"]
    words = f"{name}{row['max_error']:9.1e}{'-' if gradient is None else format(gradient, '.1e'):>9}"
    words += f"{row['milliseconds']:10.4g}{row['speed']:9.3g} {row['unit']:7}{row['share']:7.2f}"
    words += f"{'n/a' if peak is None else format(peak, '.0f'):>8}"
    if older is not None and "milliseconds" in older:
        words += f"  was {older['milliseconds']:.4g} ms: {row['milliseconds'] / older['milliseconds']:.2f} times that"
    return f"{words}  {row['note']}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
