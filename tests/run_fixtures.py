"""Small training runs for tests: in this process, in a child that can be killed, over two ranks. Not a test itself."""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from trainer.entry import exit_code
from trainer.metrics import read_metrics
from trainer.train import main

ROOT = Path(__file__).resolve().parent.parent
OWN_PAIRS = ROOT / "tests" / "golden" / "own_16.jsonl"

SETTINGS = """
[train]
global_batch = 4
max_steps = 4
tokens_per_microbatch = 500
dtype = "float32"
learning_rate = 1e-3
[kernels]
matmul = "highest"
[data]
lint = false
[checkpoint]
every = 1
[run]
threads = 1
tensorboard = "off"
"""
"""Everything measured or left to the machine is settled, so that two runs can be compared bit for bit."""

PATIENCE_S = 120
"""A child that takes longer hangs; far more than a busy machine needs."""

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")
"""Audit events of the interpreter that stand for a change of the disk (or a read); each comes before the act."""


def arguments(run_dir: Path, model: Path, *overrides: str, data: Path = OWN_PAIRS) -> list[str]:
    """The command line of a small run; `overrides` are written like "train.seed=1" and win."""
    config = run_dir.with_name(f"{run_dir.name}.toml")
    config.write_text(SETTINGS, encoding="utf-8")
    given = [f"model.path={model}", f"data.train={data}", f"run.dir={run_dir}", *overrides]
    return [str(config), *(f"--{item}" for item in given)]


def run_here(argv: list[str]) -> int:
    """Train in this process; returns the exit code. torch's settings are put back afterwards."""
    with torch_settings_kept():
        return exit_code(main, argv)


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def start_child(argv: list[str], output: Path, **watch: Any) -> BaseProcess:
    """A run in a process of its own, forked from one that has torch imported; stdout and stderr go to `output`.

    dies_at: it kills itself (SIGKILL) before this operation on its run folder, given as `operations` writes it (the
    first of that text) or by its number, from 1.
    limit_at: (operation, bytes): from there on, no file may grow past so many bytes, as on a full disk.
    environment: variables of that process alone.
    """
    return start_function(train_watched, argv, output, **watch)


def run_child(argv: list[str], output: Path, **watch: Any) -> int:
    """`start_child`, waited for; returns the exit code (-9: killed)."""
    process = start_child(argv, output, **watch)
    process.join(timeout=PATIENCE_S)
    assert process.exitcode is not None, f"still running: {output.read_text()}"
    return process.exitcode


def call_in_child(function: Callable[..., None], *args: Any) -> None:
    """Call a test module's function in a process of its own, for what a process has only once; it must not fail."""
    process = start_function(function, *args)
    process.join(timeout=PATIENCE_S)
    assert process.exitcode == 0


def start_function(function: Callable[..., None], *args: Any, **kwargs: Any) -> BaseProcess:
    """Start a test module's function in a process of its own, forked from one that has torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train", "torch.distributed.fsdp"])
    process = context.Process(target=function, args=args, kwargs=kwargs, daemon=True)
    process.start()
    return process


def start_ranks(argv: list[str], folder: Path, world_size: int = 2) -> list[BaseProcess]:
    """The run as `world_size` processes, as torchrun would start them; output in `folder/rank_N`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start_child(argv, folder / f"rank_{rank}", environment={**common, "RANK": str(rank)})
        for rank in range(world_size)
    ]


def run_ranks(argv: list[str], folder: Path, world_size: int = 2) -> list[int]:
    """`start_ranks`, waited for; returns the exit codes."""
    return exit_codes(start_ranks(argv, folder, world_size))


def exit_codes(ranks: list[BaseProcess]) -> list[int]:
    """Wait for them; one that hangs is killed."""
    for process in ranks:
        process.join(timeout=PATIENCE_S)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode if process.exitcode is not None else -1 for process in ranks]


STEP_3_SAVED = "shutil.rmtree checkpoints/step_3.tmp"
"""First operation of the checkpoint of step 3; its row of metrics is there."""
HELD_OUT = (f"data.eval={OWN_PAIRS}", "eval.max_pairs=3", "eval.every=2")


@dataclass(frozen=True)
class Unbroken:
    """A run of four steps that nothing disturbed."""

    folder: Path
    operations: list[str]
    rows: list[str]
    export: dict[str, bytes]
    last_step: dict[str, bytes]


def unbroken_run(tmp_path: Path, model: Path) -> Unbroken:
    """Make one, with an evaluation after every second step."""
    folder = tmp_path / "run"
    # once before, so that the reference cache is filled and all later runs do the same operations
    assert run_child(arguments(tmp_path / "first", model, *HELD_OUT), tmp_path / "out") == 0
    assert run_child(arguments(folder, model, *HELD_OUT), tmp_path / "out") == 0
    assert rows(folder) == rows(tmp_path / "first")
    assert [json.loads(row)["step"] for row in rows(folder)] == [1, 2, 3, 4]
    last_step = tensors(folder / "checkpoints" / "step_4")
    return Unbroken(folder, operations(tmp_path / "out"), rows(folder), contents(folder / "export"), last_step)


def killed_run(tmp_path: Path, model: Path) -> Path:
    """The folder of the same run killed when step 3 was computed, its row written and its checkpoint not begun."""
    folder = tmp_path / "run"
    argv = arguments(folder, model, *HELD_OUT, "checkpoint.asynchronous=false")  # else step 4 may be there as well
    assert run_child(argv, tmp_path / "out", dies_at=STEP_3_SAVED) == -signal.SIGKILL
    assert [json.loads(row)["step"] for row in rows(folder)] == [1, 2, 3]
    assert steps(folder) == ["step_1", "step_2"]
    return folder


def operations(output: Path) -> list[str]:
    """What a child that ended by itself did to its run folder, in order: "os.mkdir checkpoints/step_1.tmp", ..."""
    found: list[str] = json.loads(output.with_suffix(".operations").read_text(encoding="utf-8"))
    return found


def rows(run_dir: Path) -> list[str]:
    """The rows of metrics as text, floats to the last bit, without what is timed."""
    kept = [
        {name: value for name, value in row.items() if name != "time" and not name.startswith("perf/")}
        for row in read_metrics(run_dir)
    ]
    return [json.dumps(row) for row in kept]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, except the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """The files of a checkpoint whose bytes follow from the training alone; the manifest also holds paths."""
    return {name: content for name, content in contents(checkpoint).items() if name.endswith(".safetensors")}


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same(folder: Path, unbroken: Unbroken) -> None:
    assert rows(folder) == unbroken.rows
    assert contents(folder / "export") == unbroken.export
    assert tensors(folder / "checkpoints" / "step_4") == unbroken.last_step
    assert steps(folder) == ["step_3", "step_4"]
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "config.toml", "metrics.jsonl", "checkpoints", "export"}


def assert_stopped_in_one_line(output: Path, *words: str) -> None:
    text = output.read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("stopped: "))
    assert all(word in line for word in words), line
    assert "Traceback" not in text and "Exception ignored" not in text, text


def train_watched(
    argv: list[str],
    output: Path,
    *,
    dies_at: int | str | None = None,
    limit_at: tuple[str, int] | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """What `start_child` runs in the child."""
    os.environ.update(environment or {})
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    (run_dir,) = (item.removeprefix("--run.dir=") for item in argv if item.startswith("--run.dir="))
    done: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        place = os.fspath(arguments[0]) if event in OPERATIONS and isinstance(arguments[0], str | os.PathLike) else ""
        if str(place).startswith(f"{run_dir}/"):
            done.append(f"{event} {str(place).removeprefix(f'{run_dir}/')}")
            if dies_at in (done[-1], len(done)):
                os.kill(os.getpid(), signal.SIGKILL)
            if limit_at is not None and limit_at[0] == done[-1]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_at[1], limit_at[1]))

    sys.addaudithook(watch)
    code = exit_code(main, argv)
    if limit_at is None:
        output.with_suffix(".operations").write_text(json.dumps(done), encoding="utf-8")
    sys.exit(code)
