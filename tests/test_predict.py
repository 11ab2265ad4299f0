"""Predictions from shapes: by hand, and the bytes sent against those of a real step on two ranks."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from model_fixtures import tiny_config
from run_fixtures import PATIENCE_S, arguments, start_function
from torch.profiler import ProfilerActivity, profile

from trainer import bench, dist, numerics, predict
from trainer.config import load_config
from trainer.config_sections import Config, DataConfig, DistConfig
from trainer.config_sections import ModelConfig as ModelSection
from trainer.entry import exit_code
from trainer.loop import train_step
from trainer.memory_plan import root_and_block
from trainer.models.config import ModelConfig
from trainer.predict import H100, flop_floor, gathered_bytes, reduced_bytes
from trainer.startup import make_run, open_data

TINY = tiny_config()
BLOCK = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
ROOT = 2 * 97 * 64 + 64


def test_operations_by_hand() -> None:
    """A group of prompt 3 and branches 2 and 1: 6 tokens; pairs of tokens that see each other 6, 2 * 3 + 3, 3 + 1."""
    assert root_and_block(TINY) == (ROOT, BLOCK)
    assert flop_floor(TINY, [(3, 2, 1)], 3) == 6 * 2 * BLOCK * 6 + 6 * 64 * 97 * 3 + 12 * 2 * 64 * (6 + 9 + 4)


def test_seconds_on_links_by_hand() -> None:
    """8 ranks lie in a node; of 16, half of everything comes from the other node, over 8 adapters; on 4 nodes 3/4."""
    gigabyte = 1e9
    assert predict._ring_s(gigabyte, 1, H100) == 0
    assert predict._ring_s(gigabyte, 8, H100) == pytest.approx(7 / 8 / 450)
    assert predict._ring_s(gigabyte, 16, H100) == pytest.approx(15 / 16 / 450)
    slow = predict.Machine(flop_s=1, memory_s=1, inner_s=450e9, outer_s=5e9, node=8)
    assert predict._ring_s(gigabyte, 16, slow) == pytest.approx(1 / 2 / 40)
    assert predict._ring_s(gigabyte, 32, slow) == pytest.approx(3 / 4 / 40)


def test_copies_of_the_shards_exchange_gradients_once_a_step() -> None:
    """16 ranks with a copy a node: in the node as 8 ranks do, then a rank's rows there and back, half each way's."""

    def links_s(ranks: int, replicas: int) -> float:
        config = Config(model=ModelSection(path="m"), data=DataConfig(train=("d",)), dist=DistConfig(replicas=replicas))
        return predict.predict(TINY, config, 1, 3, 2, micro_batches=4, ranks=ranks, share=1.0, link_share=1.0).links_s

    inner = 4 * (gathered_bytes(TINY) + reduced_bytes(TINY)) * 7 / 8 / 450e9
    assert links_s(8, 1) == pytest.approx(inner)
    assert links_s(16, 2) == pytest.approx(inner + 2 * reduced_bytes(TINY) / 8 / 2 / 50e9)


def test_the_command_gives_both_bounds(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    argv = ["predict", "--model", str(tiny_model_dir), "--ranks", "1", "8", "16", "--json", str(out)]
    assert exit_code(bench.main, argv) == 0
    numbers = json.loads(out.read_text())
    assert numbers["ranks_1/step_s_least"] == numbers["ranks_1/step_s_most"] == numbers["ranks_1/compute_s"]
    for name in ("ranks_8", "ranks_16", "ranks_16_replicas_2"):
        assert numbers[f"{name}/step_s_most"] == pytest.approx(
            numbers[f"{name}/compute_s"] + numbers[f"{name}/links_s"], rel=1e-12
        )
    assert numbers["ranks_16/memory_gib"] < numbers["ranks_16_replicas_2/memory_gib"]
    assert numbers["ranks_16_replicas_2/memory_gib"] == numbers["ranks_8/memory_gib"]
    assert exit_code(bench.main, [*argv, "--share", "2"]) == 2
    assert "--share 2.0: must be above 0 and at most 1" in capsys.readouterr().err


def count_bytes(argv: list[str], out: Path, environment: dict[str, str]) -> None:
    """In a process of its own: the bytes of what is gathered and reduced in the second step, all ranks' parts."""
    os.environ.update(environment)
    config = load_config(argv)
    numerics.prepare_process()
    shard, _ = open_data(config)
    dist.start(torch.device("cpu"))
    run = make_run(config, shard, (), None)
    train_step(run)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        train_step(run)
    found = {"gathered": 0, "reduced": 0}
    for event in profiler.events():
        if event.name == "c10d::_allgather_base_":
            found["gathered"] += event.input_shapes[0][0] * 2
        if event.name == "c10d::_reduce_scatter_base_":
            found["reduced"] += event.input_shapes[1][0] * 4
    out.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.stop()


def test_bytes_sent_are_those_of_a_real_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    """bf16, full activation checkpointing, two micro-batches of a pair on each of two ranks, every one reduced.

    The frozen reference is sharded too: its blocks are gathered once a micro-batch, its embedding and head only before
    the first step.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ("reference.mode=model", "train.tokens_per_microbatch=1", "train.dtype=bf16")
    argv = arguments(tmp_path / "run", tiny_model_dir, *settings, "train.activation_checkpointing=full")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [start_function(count_bytes, argv, tmp_path / f"o{rank}", common | {"RANK": str(rank)}) for rank in (0, 1)]
    for process in ranks:
        process.join(timeout=PATIENCE_S)
    assert [process.exitcode for process in ranks] == [0, 0]
    model = ModelConfig.from_folder(tiny_model_dir)
    found = json.loads((tmp_path / "o0").read_text())
    of_reference = 2 * model.num_layers * root_and_block(model)[1]
    # rows are rounded up to whole ones for each rank
    assert found["gathered"] == pytest.approx(2 * (gathered_bytes(model) + of_reference), rel=0.01)
    assert found["reduced"] == pytest.approx(2 * reduced_bytes(model), rel=0.01)
