"""What sharding and activation checkpointing save: live bytes of real steps on 1 and 4 ranks, and resident memory.

Live bytes are what malloc has given out and not got back, read after every operation (torch's own profiler does not
see what gloo's threads free). The long tests look at resident memory of SmolLM2-135M, and compare it with the memory
plan.
"""

import ctypes
import json
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from run_fixtures import PATIENCE_S, arguments, start_function
from safetensors.numpy import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import dist, numerics, startup
from trainer.config import load_config
from trainer.dry_run import survey
from trainer.loop import Run, train_step
from trainer.memory_plan import HEAP_HOLES, SHARDED_HEAP, parameter_shapes, plan_memory
from trainer.models.config import ModelConfig
from trainer.models.hf_weights import hf_name
from trainer.parts import local
from trainer.startup import make_run, open_data

ONE_PAIR = "train.tokens_per_microbatch=1"
"""A pair stands alone then; with three pairs a step for each rank, that makes three micro-batches of a pair."""


class Reading(NamedTuple):
    """One rank's most bytes at a time, from before the model was loaded, and the plan's."""

    peak: float
    planned: float
    micro_batches: int


class MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 gives back, in its order; bytes."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in names)


class LiveBytes(TorchDispatchMode):
    """The most bytes that malloc had given out after any operation of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.read = ctypes.CDLL(None).mallinfo2
        self.read.restype = MallocInfo
        self.start = self.most = self.now()

    def now(self) -> int:
        info = self.read()
        return int(info.uordblks + info.hblkhd)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.most = max(self.most, self.now())
        return result


def read_live_bytes(argv: list[str], out: Path, environment: dict[str, str]) -> None:
    """In a process of its own: the second step's live bytes, weights and optimizer among them."""
    os.environ.update(environment)
    run, planned, micro_batches = prepare(argv)
    train_step(run)
    run.masters.zero_grad()
    with LiveBytes() as live:
        train_step(run)
    moments = [state[name] for state in run.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    weights = {
        parameter.data_ptr(): parameter for parameter in map(local, (*run.model.parameters(), *run.masters.masters))
    }
    stays = sum(tensor.nbytes for tensor in (*weights.values(), *moments))
    if not run.masters.same:
        stays += sum(master.grad.nbytes for master in run.masters.masters)
    heap = SHARDED_HEAP if run.masters.sharded else planned * HEAP_HOLES / (1 + HEAP_HOLES)
    write(out, Reading(stays + live.most - live.start, planned - heap, micro_batches))


def read_resident_bytes(argv: list[str], out: Path, environment: dict[str, str]) -> None:
    """In a process of its own: the most resident memory of three steps, less what was there before the model."""
    os.environ.update(environment)
    before = 0.0
    load_model = startup.load_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal before
        before = resident("VmRSS")
        return load_model(*args, **kwargs)

    startup.load_model = watched
    run, planned, micro_batches = prepare(argv)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    for _ in range(3):
        train_step(run)
    write(out, Reading(resident("VmHWM") - before, planned, micro_batches))


def prepare(argv: list[str]) -> tuple[Run, float, int]:
    """A run that is ready for its first step, and its memory plan's peak."""
    config = load_config(argv)
    numerics.prepare_process()
    shard, _ = open_data(config)
    dist.start(torch.device("cpu"))
    work = survey(config, shard, dist.world_size())
    plan = plan_memory(ModelConfig.from_folder(config.model.path), config, work, dist.world_size())
    return make_run(config, shard, (), None), plan.peak, work.micro_batches


def resident(key: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024.0 * int(line.split()[1])


def write(out: Path, reading: Reading) -> None:
    out.write_text(json.dumps(reading), encoding="utf-8")
    dist.barrier()
    dist.stop()


def read_ranks(function: Any, ranks: int, folder: Path, model: Path, *settings: str) -> Reading:
    """The reading of the fullest of so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    fixed = ("checkpoint.asynchronous=false", "train.objective=simpo", "train.max_steps=3", "data.lint=false")
    given = (*fixed, f"train.global_batch={3 * ranks}", *settings)
    argv = arguments(folder / f"run_{ranks}", model, *given, data=folder / "pairs.jsonl")
    processes = [
        start_function(function, argv, folder / f"out_{rank}", {**common, "RANK": str(rank)}) for rank in range(ranks)
    ]
    for process in processes:
        process.join(timeout=5 * PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * ranks
    readings = [Reading(*json.loads((folder / f"out_{rank}").read_text())) for rank in range(ranks)]
    return max(readings)


def write_pairs(path: Path, words: int) -> None:
    """48 pairs of about so many tokens in all."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(48):
            texts = {"prompt": f"{number}", "chosen": " yes" * (words // 2), "rejected": " no" * (words // 2)}
            file.write(json.dumps(texts) + "\n")


@pytest.fixture(scope="module")
def deep_model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 layers of width 128 and tied weights: 5.4 million numbers, of which a block, gathered whole, is little."""
    folder = tmp_path_factory.mktemp("deep")
    for path in tiny_model_dir.iterdir():
        if path.name.startswith("tokenizer"):
            (folder / path.name).write_bytes(path.read_bytes())
    changes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 36, "head_dim": 32}
    config = json.loads((tiny_model_dir / "config.json").read_text()) | changes | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = np.random.default_rng(0)
    shapes = parameter_shapes(ModelConfig.from_folder(folder))
    weights = {hf_name(name): generator.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bf16", marks=pytest.mark.long)])
def test_four_ranks_hold_a_quarter_and_little_more(dtype: str, deep_model: Path, tmp_path: Path) -> None:
    """Live bytes of parameters, gradients, optimizer and all that is gathered: at most 0.4 of one rank's."""
    write_pairs(tmp_path / "pairs.jsonl", 12)
    settings = (f"train.dtype={dtype}", "train.activation_checkpointing=full", ONE_PAIR)
    one, four = (read_ranks(read_live_bytes, ranks, tmp_path, deep_model, *settings) for ranks in (1, 4))
    print("live", dtype, one, four)
    assert (one.micro_batches, four.micro_batches) == (3, 3)
    assert four.peak <= 0.4 * one.peak
    for reading in (one, four):
        assert reading.planned == pytest.approx(reading.peak, rel=0.2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, ("train.dtype=float32",)),
        (1, ("train.dtype=float32", "train.activation_checkpointing=full")),
        (1, ("train.dtype=bf16",)),
        (1, ("train.dtype=bf16", "train.activation_checkpointing=full")),
        (2, ("train.dtype=float32", "dist.grad_sync=last")),
        (2, ("train.dtype=bf16", "train.activation_checkpointing=full")),
        (4, ("train.dtype=bf16", "train.activation_checkpointing=full")),
    ],
    ids=lambda value: "-".join(item.rpartition("=")[2] for item in value) if isinstance(value, tuple) else str(value),
)
def test_the_plan_is_within_a_fifth_of_resident_memory(
    ranks: int, settings: tuple[str, ...], smollm2_dir: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 400)
    given = ("train.tokens_per_microbatch=900", "train.learning_rate=1e-6", *settings)
    reading = read_ranks(read_resident_bytes, ranks, tmp_path, smollm2_dir, *given)
    print(
        f"resident {ranks} {' '.join(settings)}: {reading.peak / 2**20:.0f} MiB, planned {reading.planned / 2**20:.0f}"
    )
    assert reading.planned == pytest.approx(reading.peak, rel=0.2)
