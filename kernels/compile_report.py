"""`python -m kernels.compile_report`: compile every Triton kernel for GPUs that are not here; read the machine code.

Needs Triton (its package brings ptxas, nvdisasm and LLVM), no GPU and no CUDA toolkit. `--gate` exits 1 and names the
row when a kernel does not compile, spills registers, lacks tensor cores where it should have them, takes more shared
memory than the chip has, uses an atomic, has no wide load, or has its Hopper matrix instructions serialised; and when a
kernel is in no row. Not here: time, races and rounding, which no compiler can tell; the roofline is a bound.
"""

import argparse
import ast
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from kernels import dispatch
from kernels.assembly import Reading, read_amd, read_nvidia
from kernels.kernel_case import TARGETS, KernelCase

FOLDER = Path(__file__).resolve().parent


class Chip(NamedTuple):
    """What a target's best-known device has; peaks are the vendor's, without sparsity."""

    device: str
    shared_bytes: int
    """Most shared memory of one block (LDS of one workgroup)."""
    flops: float
    """bf16 products a second."""
    bandwidth: float
    """Bytes a second."""
    source: str


CHIPS = {
    "sm_80": Chip("A100", 163 << 10, 312e12, 2.039e12, "NVIDIA A100 Tensor Core GPU data sheet, 80GB SXM"),
    "sm_90": Chip("H100", 227 << 10, 989.5e12, 3.35e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM, half of sparse"),
    "sm_100": Chip("B200", 227 << 10, 2250e12, 8e12, "NVIDIA Blackwell architecture brief, HGX B200, half of sparse"),
    "gfx942": Chip("MI300X", 64 << 10, 1307.4e12, 5.3e12, "AMD Instinct MI300X data sheet"),
}
TENSOR_MEMORY_COLUMNS = 512
"""Of sm_100, for one block."""

HEAD = (
    f"{'operator: kernel':44}{'source':>12}{'target':>7}{'shape':>30}{'dtype':>6}{'regs':>5}{'spills':>7}{'KiB':>7}"
    f"{'mma':>5}{'wide':>5}{'atom':>5}{'GFLOP':>9}{'MB':>8}{'bound ms':>10}"
)


class Compiled(NamedTuple):
    """What compiling one kernel gave: a reading, or why there is none."""

    reading: Reading | None = None
    shared_bytes: int = 0
    tensor_memory_columns: int = 0
    failure: str = ""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if importlib.util.find_spec("triton") is None:
        print("compile_report: the package triton is not installed; pip install triton (Linux)", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("compile_report: TRITON_INTERPRET=1 keeps Triton from compiling; unset it", file=sys.stderr)
        return 2
    modules = [dispatch.triton_module(path.stem.removesuffix("_triton")) for path in sorted(FOLDER.glob("*_triton.py"))]
    # Each function once, also if a second file imports it.
    makers = dict.fromkeys(module.compile_cases for module in modules if hasattr(module, "compile_cases"))
    cases = [case for maker in makers for case in maker()]
    operators = sorted({case.operator for case in cases})
    if options.op is not None and options.op not in operators:
        print(f"compile_report: --op {options.op}: must be one of {', '.join(operators)}", file=sys.stderr)
        return 2
    rows = report(cases, options.op, options.target)
    print(HEAD)
    for row in rows:
        print(row_words(row))
    print("bound ms: the roofline of " + "; ".join(f"{chip.device} ({chip.source})" for chip in CHIPS.values()))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    found = [f"{row_name(row)}: {problem}" for row in rows for problem in row["problems"]]
    if options.op is None and options.target is None:
        found += gaps(modules, cases)
    for problem in found:
        print(f"FAIL {problem}")
    return 1 if found and options.gate else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--gate", action="store_true", help="exit 1 if a row breaks a rule")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file")
    parser.add_argument("--op", help="one operator only, as in kernels/<op>_triton.py")
    parser.add_argument("--target", choices=TARGETS, help="one target only")
    options = parser.parse_args(arguments)
    if options.json and (Path(options.json).is_dir() or not Path(options.json).parent.is_dir()):
        parser.error(f"--json {options.json}: must be a file in a folder that exists")
    return options


def report(cases: Iterable[KernelCase], operator: str | None = None, target: str | None = None) -> list[dict[str, Any]]:
    """One row for every case and target of it, in the order of `cases`. Equal code compiles once."""
    wanted = [
        (case, name)
        for case in cases
        for name in case.targets
        if operator in (None, case.operator) and target in (None, name)
    ]
    compiled = compile_all({identity(case, name): (case, name) for case, name in wanted})
    return [make_row(case, name, compiled[identity(case, name)]) for case, name in wanted]


def identity(case: KernelCase, target: str) -> str:
    """Equal for what the compiler cannot tell apart."""
    kernel = f"{case.kernel.__module__}.{case.kernel.__name__}"
    types = (sorted(case.signature.items()), sorted(case.constexprs.items()))
    marks = (sorted(case.divisible_by_16), sorted(case.over_2_gib), case.num_warps, case.num_stages)
    return repr((kernel, target, types, marks))


def compile_all(wanted: dict[str, tuple[KernelCase, str]]) -> dict[str, Compiled]:
    """Compile each in a process of its own, one a core at a time: LLVM may abort, and takes the process with it."""
    from triton.compiler import code_generator  # noqa: F401  here and not in every child
    from triton.runtime.cache import triton_key

    triton_key()  # the same: hashes Triton's files, 0.6 s, and remembers
    jobs = len(os.sched_getaffinity(0))
    fork = multiprocessing.get_context("fork")  # kernels cannot be pickled
    waiting, running, compiled = list(wanted.items()), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            key, (case, target) = waiting.pop(0)
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_send_compiled, args=(sender, case, target))
            process.start()
            sender.close()  # so that the child's end is the only one, and its death an end of file
            running[receiver] = (key, process)
        for receiver in wait(list(running)):
            key, process = running.pop(receiver)
            try:
                compiled[key] = receiver.recv()
                process.join()
            except EOFError:
                process.join()
                compiled[key] = Compiled(failure=f"the compiler ended the process (exit code {process.exitcode})")
    return compiled


def _send_compiled(sender: Connection, case: KernelCase, target: str) -> None:
    """In the child. What Triton, ptxas and LLVM print goes into a file: ptxas' log is needed, the rest is noise."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryDirectory() as cache:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)

        def log() -> str:
            sys.stdout.flush()
            printed.seek(0)
            return printed.read().decode(errors="replace")

        try:
            sender.send(compile_case(case, target, cache, log))
        except Exception as error:  # whatever the compiler raises is what the row has to say
            lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
            notes = [line for line in log().splitlines() if "error:" in line]
            sender.send(Compiled(failure=" ".join(dict.fromkeys([lines[0], lines[-1], *notes]))[:400]))


def compile_case(case: KernelCase, target: str, cache: str, log: Callable[[], str]) -> Compiled:
    """Compile one kernel for one target, as a launch at the case's shape would, and read the result.

    cache: an empty folder, for Triton's files. log: returns what was printed so far. Raises what Triton raises, and
    ValueError for a case that does not name every argument of its kernel.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    knobs.cache.dir = cache
    knobs.nvidia.dump_ptxas_log = True
    source = ASTSource(case.kernel, signature(case), dict(case.constexprs), attributes(case, target))
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    settings = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=gpu, options=settings)
    if amd:
        return Compiled(read_amd(kernel.asm["amdgcn"], kernel.asm["ttir"]), kernel.metadata.shared)
    cubin = Path(cache, "kernel.cubin")
    cubin.write_bytes(kernel.asm["cubin"])
    disassembler = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(cubin)]  # without its analysis of jumps: 0.1 s
    sass = subprocess.run(disassembler, check=True, capture_output=True, text=True).stdout
    columns = kernel.metadata.tmem_size or 0
    return Compiled(read_nvidia(sass, log(), kernel.asm["ttir"]), kernel.metadata.shared, columns)


def signature(case: KernelCase) -> dict[str, str]:
    """Argument -> type in the kernel's order, as ASTSource takes it. Raises ValueError if the case misses one."""
    names = case.kernel.arg_names
    if set(names) != {*case.signature, *case.constexprs}:
        odd = sorted(set(names) ^ {*case.signature, *case.constexprs})
        raise ValueError(f"the case and the kernel's arguments differ: {', '.join(odd)}")
    return {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}


def attributes(case: KernelCase, target: str) -> dict[tuple[int], list[list[Any]]]:
    """What Triton would know of the arguments at a launch: without it no load is wide and everything spills."""
    known = {}
    for index, name in enumerate(case.kernel.arg_names):
        marks: list[list[Any]] = [["tt.divisibility", 16]] if name in case.divisible_by_16 else []
        if target.startswith("gfx") and case.signature.get(name, "").startswith("*") and name not in case.over_2_gib:
            marks.append(["tt.pointer_range", 32])
        if marks:
            known[(index,)] = marks
    return known


def make_row(case: KernelCase, target: str, compiled: Compiled) -> dict[str, Any]:
    """A row as `--json` writes it; the numbers that only a compiled kernel has are None where it failed."""
    reading, chip = compiled.reading, CHIPS[target]
    return {
        "operator": case.operator,
        "kernel": case.kernel.__name__,
        "source": case.source,
        "target": target,
        "shape": case.shape,
        "dtype": case.dtype,
        "spills": reading and reading.spills,
        "shared_bytes": reading and compiled.shared_bytes,
        "registers": reading and reading.registers,
        "tensor_core_ops": reading and reading.tensor_core_ops,
        "wide_loads": reading and reading.wide_loads,
        "atomics": reading and reading.atomics,
        "flops": case.flops,
        "bytes": case.bytes_moved,
        "roofline_ms": max(case.flops / chip.flops, case.bytes_moved / chip.bandwidth) * 1e3,
        "problems": list(problems(case, target, compiled)),
    }


def problems(case: KernelCase, target: str, compiled: Compiled) -> Iterator[str]:
    """What `--gate` has against a compiled kernel."""
    reading, chip = compiled.reading, CHIPS[target]
    if reading is None:
        yield f"does not compile: {compiled.failure}"
        return
    if reading.spills:
        yield f"{reading.spills} spills"
    if case.is_gemm and not reading.tensor_core_ops:
        yield "a matrix product without tensor cores"
    if compiled.shared_bytes > chip.shared_bytes:
        yield f"{compiled.shared_bytes} bytes of shared memory, {chip.device} has {chip.shared_bytes}"
    if compiled.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        yield f"{compiled.tensor_memory_columns} columns of tensor memory, {chip.device} has {TENSOR_MEMORY_COLUMNS}"
    if reading.atomics:
        yield f"{reading.atomics} atomics"
    if not reading.wide_loads:
        yield "no load of 16 bytes a thread"
    if reading.serialized:
        yield "ptxas serialises its wgmma instructions"


def gaps(modules: Iterable[Any], cases: Iterable[KernelCase]) -> Iterator[str]:
    """Kernels that no case compiles (those that other kernels call apart), and operators without a row for a target."""
    cases = list(cases)
    if not cases:
        yield f"no file {FOLDER.name}/*_triton.py has a compile case"
    kernels = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if hasattr(value, "src") and value.__module__ == module.__name__
    }
    called = {
        node.id
        for kernel in kernels.values()
        for node in ast.walk(ast.parse(textwrap.dedent(kernel.src)))
        if isinstance(node, ast.Name)
    }
    compiled = {case.kernel.__name__ for case in cases}
    for name in sorted(kernels.keys() - called - compiled):
        yield f"{kernels[name].__module__}: {name}: no compile case"
    for operator in sorted({case.operator for case in cases}):
        covered = {target for case in cases if case.operator == operator for target in case.targets}
        for target in TARGETS:
            if target not in covered:
                yield f"{operator}: no compile case for {target}"


def row_name(row: dict[str, Any]) -> str:
    return f"{row['operator']}: {row['kernel']} ({row['source']}) {row['target']} {row['shape']} {row['dtype']}"


def row_words(row: dict[str, Any]) -> str:
    name = f"{row['operator']}: {row['kernel']}"
    words = f"{name:44}{row['source']:>12}{row['target']:>7}{row['shape']:>30}{row['dtype']:>6}"
    if row["spills"] is None:
        return f"{words}  does not compile"
    words += f"{row['registers']:5}{row['spills']:7}{row['shared_bytes'] / 1024:7.1f}"
    words += f"{row['tensor_core_ops']:5}{row['wide_loads']:5}{row['atomics']:5}"
    return f"{words}{row['flops'] / 1e9:9.3g}{row['bytes'] / 1e6:8.4g}{row['roofline_ms']:10.3g}"


if __name__ == "__main__":
    sys.exit(main())
