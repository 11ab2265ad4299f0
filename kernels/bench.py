"""`python -m kernels.bench`: what each way to `linear_logps` costs, how exact it is, and the same for small operators.

Every row runs in a process of its own, one after another, so that its peak memory is its own: what forward and backward
add to the inputs. Times are the median of forward and backward together; the share is that of a bare product's speed,
measured in the same process between the repeats. On a machine that others use, compare with `--threads 1 --clock cpu`.
Errors are against float64. Not a test: nothing here fails.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.linear_logps import linear_logps
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.swiglu_linear import swiglu_linear

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
ROOT = Path(__file__).resolve().parent.parent
ERROR_ROWS = 64

# variant -> products of 2*N*D*V operations, forward and backward
LINEAR_LOGPS = {
    "full logits": 3,
    "recompute": 4,
    "stash": 3,
    "frozen head": 2,
    "no gradient": 1,
    "F.linear_cross_entropy": 4,
}
SMALL = {
    "rms_norm": (reference.rms_norm, rms_norm),
    "swiglu_linear": (reference.swiglu_linear, swiglu_linear),
    "rope": (reference.apply_rope, apply_rope),
}
HEAD = f"{'variant':24}{'max error':>11}{'grad error':>12}{'ms':>10}{'GFLOP/s':>10}{'share':>8}{'MiB':>8}"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.row is not None:
        print(json.dumps(measure(options.row, options)))
        return 0
    if not available("F.linear_cross_entropy"):
        print("note: this PyTorch has no F.linear_cross_entropy")
    threads = options.threads or torch.get_num_threads()
    print(f"{device_name()}, {threads} threads, torch {torch.__version__}, {options.dtype}")
    variants = list(LINEAR_LOGPS) if options.op == "linear_logps" else ["plain", "ours"]
    print(f"{options.op}: {shape_words(options)}\n{HEAD}")
    rows = []
    for variant in variants:
        if available(variant):
            rows.append(run_row(variant, sys.argv[1:] if arguments is None else arguments))
            print(row_words(rows[-1]), flush=True)
    if options.json:
        about = {"device": device_name(), "threads": threads, "torch": torch.__version__}
        shape = {key: getattr(options, key) for key in ("op", "dtype", "rows", "width", "vocab", "matmul", "clock")}
        Path(options.json).write_text(json.dumps({**about, **shape, "readings": rows}, indent=1) + "\n")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=["linear_logps", *SMALL], default="linear_logps")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--rows", type=int, default=1024, help="tokens (default 1024)")
    parser.add_argument("--width", type=int, default=576, help="width of the hidden states (default 576)")
    parser.add_argument("--vocab", type=int, default=49152, help="vocabulary, for linear_logps (default 49152)")
    parser.add_argument("--matmul", choices=["highest", "medium"], default="highest", help="float32 products")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: time of this process, all threads"
    )
    parser.add_argument("--json", help="write the readings to this file")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # how a row's own process is told what to measure
    options = parser.parse_args(arguments)
    for name in ("rows", "width", "vocab", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    return options


def available(variant: str) -> bool:
    return variant != "F.linear_cross_entropy" or hasattr(torch.nn.functional, "linear_cross_entropy")


def run_row(variant: str, arguments: list[str]) -> dict[str, Any]:
    """Measure one row in a fresh process."""
    command = [sys.executable, "-m", "kernels.bench", *arguments, "--row", variant]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"variant": variant, "failed": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul)
    torch.manual_seed(0)
    dtype = DTYPES[options.dtype]
    if options.op == "linear_logps":
        inputs = linear_logps_inputs(options.rows, options.width, options.vocab, dtype)
        function, truth = linear_logps_variant(variant), reference.linear_logps
        work = 2 * options.rows * options.width * options.vocab * LINEAR_LOGPS[variant]
    else:
        inputs = small_inputs(options.op, options.rows, options.width, dtype)
        truth, ours = SMALL[options.op]
        function, work = ours if variant == "ours" else truth, 0
    gradient = variant != "no gradient"
    frozen = (1,) if variant == "frozen head" else ()
    leaves = [
        tensor.requires_grad_(gradient and index not in frozen) if index in trained(options.op) else tensor
        for index, tensor in enumerate(inputs)
    ]
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    forget_peak()
    before = peak_mib()
    milliseconds, limit = timings(function, leaves, options.repeats, gradient, clock)
    peak = peak_mib() - before
    error, gradient_error = errors(function, truth, leaves, options.op == "linear_logps")
    row = {"variant": variant, "max_error": error, "gradient_error": gradient_error, "milliseconds": milliseconds}
    speed = work / milliseconds / 1e6
    return {**row, "gflops": speed, "gemm_share": speed / limit if work else 0.0, "peak_mib": peak}


def trained(op: str) -> tuple[int, ...]:
    return {"rope": (0,), "swiglu_linear": (0, 1, 2)}.get(op, (0, 1))


def linear_logps_inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> list[Any]:
    """Logits spread like a trained model's (deviation 3, a likely token's near 20); half of the targets are likely."""
    weight = torch.randn(vocabulary, width) * 0.1
    targets = torch.randint(vocabulary, (rows,))
    likely = torch.where(torch.arange(rows) % 2 == 0, targets, torch.randint(vocabulary, (rows,)))
    hidden = torch.randn(rows, width) * (30 / math.sqrt(width)) + weight[likely] * (2000 / width)
    return [hidden.to(dtype), weight.to(dtype), targets]


def small_inputs(op: str, tokens: int, width: int, dtype: torch.dtype) -> list[Any]:
    if op == "rms_norm":
        return [torch.randn(tokens, width).to(dtype), torch.rand(width).to(dtype), 1e-5]
    if op == "swiglu_linear":
        inner = width * 8 // 3
        weight = torch.randn(width, inner) / math.sqrt(inner)
        return [torch.randn(tokens, inner).to(dtype), torch.randn(tokens, inner).to(dtype), weight.to(dtype)]
    head = 64 if width % 64 == 0 else width
    angles = torch.rand(tokens, head // 2) * 6
    return [torch.randn(tokens, width // head, head).to(dtype), angles.cos(), angles.sin()]


def linear_logps_variant(variant: str) -> Callable[..., Tensor]:
    if variant == "full logits":
        return reference.linear_logps
    if variant == "F.linear_cross_entropy":  # with options it goes through the tokens in chunks
        fused, chunked = torch.nn.functional.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
        return lambda hidden, weight, targets: -fused(hidden, weight, targets, reduction="none", options=chunked)
    return lambda hidden, weight, targets: linear_logps(hidden, weight, targets, stash=variant == "stash", impl="cpu")


def timings(
    function: Callable[..., Tensor], leaves: list[Any], repeats: int, gradient: bool, clock: Callable[[], float]
) -> tuple[float, float]:
    """(median milliseconds, best GFLOP/s of a bare product), taken in turn; the first round of each is not counted."""
    left, right = torch.randn(2048, 576).to(leaves[0].dtype), torch.randn(576, 1536).to(leaves[0].dtype)
    out = torch.empty(2048, 1536, dtype=left.dtype)
    times, product_times = [], []
    for _ in range(repeats + 1):
        product_times.append(seconds(lambda: torch.mm(left, right, out=out), clock))
        times.append(seconds(lambda: step(function, leaves, gradient), clock))
    return statistics.median(times[1:]) * 1e3, 2 * left.numel() * 1536 / min(product_times[1:]) / 1e9


def step(function: Callable[..., Tensor], leaves: list[Any], gradient: bool) -> None:
    with torch.set_grad_enabled(gradient):
        out = function(*leaves)
    if gradient:
        out.sum().backward()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf.grad = None


def seconds(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    function()
    return clock() - start


def errors(
    function: Callable[..., Tensor], truth: Callable[..., Tensor], leaves: list[Any], by_rows: bool
) -> tuple[float, float]:
    """(largest error of the values, largest error of a gradient relative to its largest entry) against float64.

    For linear_logps on the first rows only: float64 logits of all of them would be the largest thing here.
    """
    if by_rows:
        leaves = [leaves[0].detach()[:ERROR_ROWS].requires_grad_(leaves[0].requires_grad), *leaves[1:]]
        leaves[2] = leaves[2][:ERROR_ROWS]
    exact = [widened(leaf) for leaf in leaves]
    value, expected = function(*leaves), truth(*exact)
    error = float((value.detach().double() - expected.detach()).abs().max())
    wanted = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not wanted:
        return error, 0.0
    grads = torch.autograd.grad(value.sum(), [leaves[index] for index in wanted])
    exact_grads = torch.autograd.grad(expected.sum(), [exact[index] for index in wanted])
    pairs = zip(grads, exact_grads, strict=True)
    return error, max(float((one.double() - other).abs().max() / other.abs().max()) for one, other in pairs)


def widened(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().double().requires_grad_(leaf.requires_grad)
    return leaf


def forget_peak() -> None:
    """Let the peak that the kernel remembers fall to what is resident now, where it allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_mib() -> float:
    """The largest resident size of this process so far, MiB; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def device_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0]}" if names else "CPU"


def shape_words(options: argparse.Namespace) -> str:
    if options.op == "linear_logps":
        return f"hidden ({options.rows}, {options.width}), weight ({options.vocab}, {options.width})"
    return f"({options.rows}, {options.width})"


def row_words(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['variant']:24} failed: {' '.join(row['failed'])}"
    numbers = f"{row['max_error']:11.1e}{row['gradient_error']:12.1e}{row['milliseconds']:10.1f}"
    speed = f"{row['gflops']:10.0f}{row['gemm_share']:8.2f}" if row["gflops"] else f"{'':18}"
    return f"{row['variant']:24}{numbers}{speed}{row['peak_mib']:8.0f}"


if __name__ == "__main__":
    sys.exit(main())
