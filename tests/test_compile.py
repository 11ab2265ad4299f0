"""Compiled layers: the numbers of plain ones, one compilation for streams of every length, sharded or not.

The short tests stop before C++: the graphs that torch.compile makes of a layer, forward and backward, run operator by
operator ("aot_eager"). The long one has them compiled.
"""

import functools
import json
import os
import shutil
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from model_fixtures import random_decoder, random_pairs, tiny_config
from run_fixtures import HELD_OUT, PATIENCE_S, arguments, call_in_child, rows, run_child, start_child, start_ranks
from torch import Tensor

from trainer.batch import build_stream
from trainer.config import load_config
from trainer.errors import ConfigError
from trainer.models.decoder import Decoder
from trainer.parallelize import check_compiler, compile_blocks, recompute_activations


@pytest.fixture
def graphs_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


def logps_and_gradients(model: Decoder, pairs: int) -> list[Tensor]:
    model.zero_grad()
    logps = model(build_stream(random_pairs(pairs, seed=pairs)))
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return [logps.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.usefixtures("graphs_only")
def test_layers_are_compiled_once_for_streams_of_every_length() -> None:
    """Two layers: the first gets nothing to add and is recomputed, the second not.

    The width is no multiple of 32 as lengths are: a length that is by chance the same would be taken for it.
    """
    config = tiny_config(hidden_size=80, head_dim=16, tie_word_embeddings=True)
    plain, compiled = random_decoder(config), random_decoder(config)
    for model in (plain, compiled):
        recompute_activations(model, "every_2")
    compile_blocks(compiled)
    lengths: list[int] = []
    for pairs in (4, 1, 9, 30, 2, 12):
        with torch.compiler.set_stance("default" if not lengths else "fail_on_recompile"):
            found = logps_and_gradients(compiled, pairs)
        lengths.append(len(found[0]))
        # the same operators in float32, gradients added up in another order
        for ours, theirs in zip(found, logps_and_gradients(plain, pairs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert len(set(lengths)) == 6


def test_selective_checkpointing_and_compiled_layers_are_refused(tmp_path: Path) -> None:
    argv = arguments(tmp_path / "run", Path("m"), "train.compile=true", "train.activation_checkpointing=selective")
    with pytest.raises(ConfigError, match=r"train.compile = true: cannot go with .* = selective; use every_K"):
        load_config(argv)


def refuse_without_a_compiler(cache: Path) -> None:
    os.environ |= {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    with pytest.raises(ConfigError, match=r"train.compile = true: nothing can be compiled here \(.*/nowhere/c\+\+"):
        check_compiler(torch.device("cpu"))


def test_a_machine_without_a_compiler_says_so(tmp_path: Path) -> None:
    call_in_child(refuse_without_a_compiler, tmp_path)


def finish(processes: list[BaseProcess]) -> list[int | None]:
    """Their exit codes; a C++ compiler takes its time."""
    for process in processes:
        process.join(timeout=5 * PATIENCE_S)
    return [process.exitcode for process in processes]


@pytest.mark.long
def test_compiled_runs_give_the_curve_of_a_plain_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """On one rank, resumed from a plain run, and on two that share the model, with activation checkpointing."""
    settings = (
        *HELD_OUT,
        "train.max_steps=6",
        "train.epochs=2",
        "train.tokens_per_microbatch=150",
        "checkpoint.keep_last=9",
    )
    plain, one, two = (tmp_path / name for name in ("plain", "one", "two"))
    assert run_child(arguments(plain, tiny_model_dir, *settings), tmp_path / "out") == 0
    shutil.copytree(plain, one)
    shutil.rmtree(one / "export")
    for step in (4, 5, 6):
        shutil.rmtree(one / "checkpoints" / f"step_{step}")
    compiled = (*settings, "train.compile=true")
    assert finish([start_child(arguments(one, tiny_model_dir, *compiled), tmp_path / "out")]) == [0]
    assert "at step 3 of 6" in (tmp_path / "out").read_text()
    shared = (*compiled, "train.activation_checkpointing=full")
    assert finish(start_ranks(arguments(two, tiny_model_dir, *shared), tmp_path)) == [0, 0]
    for folder in (one, two):
        for found, wanted in zip(rows(folder), rows(plain), strict=True):
            ours, theirs = json.loads(found), json.loads(wanted)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5)
