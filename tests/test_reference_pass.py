"""The reference pass: the same batches and bits after a kill and at any world size; nothing lost between two jobs."""

import fcntl
import gc
import json
import os
import signal
import socket
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_fixtures import (
    OWN_PAIRS,
    PATIENCE_S,
    arguments,
    operations,
    rows,
    run_here,
    run_ranks,
    start_function,
    train_watched,
)

from data_tools.encode import Group
from trainer import dist, reference_pass, startup
from trainer.errors import RunError, TrainingStopped, UserError
from trainer.loader import rounds
from trainer.models.hf_weights import load_decoder
from trainer.reference_cache import Header, ReferenceCache, read_cache_file, row_key, row_keys
from trainer.reference_pass import plan_batches, score_missing

CPU = torch.device("cpu")
HEADER = Header(weights="w", dtype="float32", kernel="cpu")
SMALL_BATCHES = "train.tokens_per_microbatch=300"
"""Batches of the pass hold 600 tokens then: 2, 2, 2, 2, 2, 3 and 3 of the 16 pairs."""
CACHE = "ref.safetensors"
SAVED = f"os.rename {CACHE}.tmp"
"""A save of the cache file as `operations` writes it; it comes before the act."""


def pair(number: int, size: int = 8) -> Group:
    """A pair of its own for each number, of `size` tokens."""
    ids = np.array([3 + number % 90, 3 + number // 90 % 90, *range(3, size + 1)], dtype=np.int32)
    return Group(f"pair-{number}", ids, (2, 2, size - 4), ((), ((0, 2),), ((0, size - 4),)))


def names(batches: list[list[Group]]) -> list[list[str]]:
    return [[group.record_id for group in batch] for batch in batches]


# --- the plan --------------------------------------------------------------------------------------------------------


def test_batches_are_cut_longest_first_where_the_budget_is_full() -> None:
    groups = [pair(i, size) for i, size in enumerate((5, 9, 6, 6, 20, 5))]
    batches = plan_batches(groups, 12)
    assert [[len(group.ids) for group in batch] for batch in batches] == [[20], [9], [6, 6], [5, 5]]
    assert plan_batches([], 12) == []


@given(st.lists(st.integers(5, 40), min_size=1, max_size=30), st.integers(1, 90), st.data())
def test_what_a_killed_pass_left_falls_into_the_batches_it_would_have_formed(
    sizes: list[int], budget: int, data: st.DataObject
) -> None:
    groups = [pair(i, size) for i, size in enumerate(sizes)]
    batches = plan_batches(data.draw(st.permutations(groups)), budget)
    assert sorted(chain(*names(batches))) == sorted(group.record_id for group in groups)
    assert all(len(batch) == 1 or sum(len(group.ids) for group in batch) <= budget for batch in batches)
    done = data.draw(st.integers(0, len(batches)))
    left = data.draw(st.permutations(list(chain(*batches[done:]))))
    assert names(plan_batches(left, budget)) == names(batches[done:])


# --- two ranks -------------------------------------------------------------------------------------------------------


def on_ranks(function: Any, *args: Any, world_size: int = 2) -> None:
    """Call a function of this module on every rank of a process group, in children; none may fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size)}
    ranks = [start_function(_as_rank, {**place, "RANK": str(rank)}, function, *args) for rank in range(world_size)]
    for process in ranks:
        process.join(timeout=PATIENCE_S)
    assert [process.exitcode for process in ranks] == [0] * world_size


def _as_rank(environment: dict[str, str], function: Any, *args: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.start(CPU)
    function(*args)
    dist.stop()


def _pass_over_three_batches(model_dir: Path, folder: Path) -> None:
    model = load_decoder(model_dir).requires_grad_(False)
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda module, args: forwards.append(len(args[0].tokens)))
    cache = ReferenceCache(folder / CACHE, HEADER)
    missing = cache.missing([pair(i, 20 + i) for i in range(6)])
    score_missing(cache, missing, model, device=CPU, tokens_per_batch=50)
    found = {key.hex(): row.tolist() for key, row in cache._rows.items()}
    (folder / f"rank_{dist.rank()}").write_text(json.dumps([forwards, found]))


def test_every_rank_runs_as_many_forward_passes_and_gets_all_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    on_ranks(_pass_over_three_batches, tiny_model_dir, tmp_path)
    (first, rows_0), (second, rows_1) = (json.loads((tmp_path / f"rank_{rank}").read_text()) for rank in (0, 1))
    assert first == [25 + 24, 21 + 20] and second == [23 + 22, 2]  # two tokens: the idle stream
    assert rows_0 == rows_1 and len(rows_0) == 12
    _, in_file = read_cache_file(tmp_path / CACHE)
    assert {key.hex(): row.tolist() for key, row in in_file.items()} == rows_0


def _stopped_pass(model_dir: Path, folder: Path) -> None:
    model = load_decoder(model_dir).requires_grad_(False)
    if dist.rank() == 1:
        model.register_forward_pre_hook(lambda module, args: os.kill(os.getpid(), signal.SIGTERM))
    cache = ReferenceCache(folder / CACHE, HEADER)
    groups = [pair(i, 20 + i) for i in range(6)]
    words = ["another rank was asked to stop", "SIGTERM"][dist.rank()]
    with pytest.raises(TrainingStopped, match=f"{CACHE}: {words}; 2 of 3 batches are scored, start the same command"):
        score_missing(cache, groups, model, device=CPU, tokens_per_batch=50)
    assert names([cache.missing(groups)]) == [["pair-0", "pair-1"]]
    _, in_file = read_cache_file(folder / CACHE)
    assert len(in_file) == 8
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_on_one_rank_ends_the_pass_on_all_with_its_rows_saved(tiny_model_dir: Path, tmp_path: Path) -> None:
    on_ranks(_stopped_pass, tiny_model_dir, tmp_path)


def _rounds_and_missing(folder: Path) -> None:
    mine = [["a", "b", "c"], ["d"]][dist.rank()]
    assert list(rounds(mine)) == [["a", "b", "c"], ["d", None, None]][dist.rank()]
    cache = ReferenceCache(folder / f"{dist.rank()}", HEADER)
    groups = [pair(0), pair(1), pair(2), pair(1)]
    for known in ([0, 1], [0, 2])[dist.rank()]:
        cache.add({key: np.zeros(1, dtype=np.float32) for key in row_keys(pair(known))})
    assert names([cache.missing(groups)]) == [["pair-1", "pair-2"]]


def test_ranks_that_read_different_files_agree_on_what_is_missing(tmp_path: Path) -> None:
    on_ranks(_rounds_and_missing, tmp_path)


# --- a kill in the middle --------------------------------------------------------------------------------------------


def _train_saving_every_round(argv: list[str], output: Path, **watch: Any) -> None:
    reference_pass.SAVE_EVERY_S, reference_pass.SAVE_SHARE = 0.0, float("inf")
    train_watched(argv, output, **watch)


def run_saving_every_round(argv: list[str], output: Path, **watch: Any) -> int:
    process = start_function(_train_saving_every_round, argv, output, **watch)
    process.join(timeout=PATIENCE_S)
    assert process.exitcode is not None, output.read_text()
    return process.exitcode


def line_of(output: Path) -> str:
    (line,) = (line for line in output.read_text().splitlines() if line.startswith("reference: "))
    return line


def content(path: Path) -> tuple[dict[str, object], dict[bytes, bytes]]:
    header, in_file = read_cache_file(path)
    return header, {key: row.tobytes() for key, row in in_file.items()}


def test_a_killed_pass_goes_on_to_the_bits_of_an_unbroken_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Also: two ranks compute these bits, and the whole run after the kill is the unbroken one."""

    def prepare(name: str) -> tuple[list[str], Path, Path]:
        folder = tmp_path / name
        argv = arguments(folder, tiny_model_dir, SMALL_BATCHES, f"reference.cache_file={folder / CACHE}")
        return argv, tmp_path / f"{name}.out", folder

    argv, output, whole = prepare("whole")
    assert run_saving_every_round(argv, output) == 0
    assert line_of(output).startswith("reference: 0 of 16 groups cached, 16 to score")
    saves = [number for number, text in enumerate(operations(output), start=1) if text == SAVED]
    assert len(saves) == 7

    for name, dies_at, cached in (("before", saves[3], 6), ("after", saves[3] + 1, 8)):
        argv, output, folder = prepare(name)
        assert run_saving_every_round(argv, output, dies_at=dies_at) == -signal.SIGKILL
        assert (folder / f"{CACHE}.tmp").exists() is (name != "after")
        assert run_saving_every_round(argv, output) == 0
        assert line_of(output).startswith(f"reference: {cached} of 16 groups cached, {16 - cached} to score")
        assert content(folder / CACHE) == content(whole / CACHE)
        assert not (folder / f"{CACHE}.tmp").exists()
        assert rows(folder) == rows(whole)

    for strategy in ("replicas", "fsdp"):  # 7 batches: the second rank goes without in the last round
        argv, _, folder = prepare(strategy)
        assert run_ranks([*argv, f"--dist.strategy={strategy}"], tmp_path) == [0, 0]
        assert content(folder / CACHE) == content(whole / CACHE)


def test_another_world_size_and_another_beta_find_every_row(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (f"reference.cache_dir={tmp_path / 'cache'}", f"data.eval={OWN_PAIRS}", "train.max_steps=1")
    assert run_ranks(arguments(tmp_path / "two", tiny_model_dir, *settings), tmp_path) == [0, 0]
    assert line_of(tmp_path / "rank_0").startswith("reference: ")
    for beta in (0.1, 0.5):
        argv = arguments(tmp_path / f"beta-{beta}", tiny_model_dir, *settings, f"loss.beta={beta}")
        assert run_here(argv) == 0
        said = capsys.readouterr().out
        # the step's 4 pairs and the 16 held-out ones
        assert "reference: 20 of 20 groups cached, 0 to score" in said and "reference pass" not in said
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


# --- two jobs on one file --------------------------------------------------------------------------------------------


def _fill(model_dir: Path, path: Path, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    model = load_decoder(model_dir).requires_grad_(False)
    reference_pass.SAVE_SHARE = float("inf")
    cache = ReferenceCache.open(path, HEADER, named_by_user=True)
    groups = [pair(number, 20) for number in numbers]
    score_missing(cache, cache.missing(groups), model, device=CPU, tokens_per_batch=20, save_every_s=0.0)
    assert cache.missing(groups) == []


def test_two_processes_that_fill_one_file_at_once_lose_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Each saves 40 times; they share a third of their pairs."""
    parts = [list(range(40)), list(range(79, 26, -1))]
    children = [start_function(_fill, tiny_model_dir, tmp_path / CACHE, part) for part in parts]
    for process in children:
        process.join(timeout=PATIENCE_S)
    assert [process.exitcode for process in children] == [0, 0]
    _, in_file = read_cache_file(tmp_path / CACHE)
    assert in_file.keys() == {key for number in range(80) for key in row_keys(pair(number, 20))}


def test_a_save_waits_for_the_one_that_is_writing(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / CACHE, HEADER)
    cache.add({row_key(pair(0), 1): np.float32([-1])})
    with open(tmp_path / f"{CACHE}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        save = threading.Thread(target=cache.save)
        save.start()
        save.join(timeout=0.3)
        assert save.is_alive() and not cache.path.exists()
    save.join(timeout=PATIENCE_S)
    assert len(read_cache_file(cache.path)[1]) == 1


def test_a_row_that_is_there_stays_and_everyone_takes_it_over(tmp_path: Path) -> None:
    first, second = (ReferenceCache.open(tmp_path / CACHE, HEADER, named_by_user=True) for _ in range(2))
    key, own = row_key(pair(0), 1), row_key(pair(1), 1)
    first.add({key: np.float32([-1, -2])})
    first.add({key: np.float32([-3, -4])})
    first.save()
    second.add({key: np.float32([-5, -6]), own: np.float32([-7])})
    second.save()
    assert second._rows[key].tolist() == [-1, -2]
    _, in_file = read_cache_file(tmp_path / CACHE)
    assert {name: row.tolist() for name, row in in_file.items()} == {key: [-1, -2], own: [-7]}


def test_a_named_file_that_another_model_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    other = ReferenceCache.open(tmp_path / CACHE, Header("v", "float32", "cpu"), named_by_user=True)
    cache = ReferenceCache.open(tmp_path / CACHE, HEADER, named_by_user=True)
    other.add({row_key(pair(0), 1): np.float32([-1])})
    other.save()
    before = other.path.read_bytes()
    cache.add({row_key(pair(0), 1): np.float32([-2])})
    with pytest.raises(RunError, match="is a reference cache of something else .weights 'v' instead of 'w'."):
        cache.save()
    assert cache.path.read_bytes() == before


def test_a_save_that_fails_ends_the_pass_with_its_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / CACHE, HEADER)
    cache.path.with_name(f"{CACHE}.tmp").mkdir()
    model = load_decoder(tiny_model_dir).requires_grad_(False)
    with pytest.raises(UserError, match="the reference cache cannot be written .*; set reference.cache_dir") as caught:
        score_missing(cache, [pair(0)], model, device=CPU, tokens_per_batch=99)
    assert "\n" not in str(caught.value)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_pass_holds_one_model_in_the_compute_dtype_and_nothing_of_the_training(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No float32 master, gradient or moment, no policy: the tensors alive during the pass are the bf16 reference."""
    held: list[int] = []

    def bytes_of_tensors() -> int:
        gc.collect()
        found = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
        return sum({value.untyped_storage().data_ptr(): value.nbytes for value in found}.values())

    def watched(cache: ReferenceCache, missing: list[Group], model: torch.nn.Module, **kwargs: Any) -> None:
        held.append(bytes_of_tensors() - before - sum(value.nbytes for value in model.parameters()))
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
        score_missing(cache, missing, model, **kwargs)

    monkeypatch.setattr(startup, "score_missing", watched)
    argv = arguments(tmp_path / "run", tiny_model_dir, "train.dtype=bf16", f"reference.cache_dir={tmp_path / 'cache'}")
    before = bytes_of_tensors()
    assert run_here(argv) == 0
    assert len(held) == 1 and abs(held[0]) < 4096
