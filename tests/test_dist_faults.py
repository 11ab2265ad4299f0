"""Two ranks that share a model (FSDP2), and what can go wrong with one of them: one clear line, and nothing is lost.

Ranks are children that share a process group (gloo).
"""

import json
import os
import resource
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from run_fixtures import (
    arguments,
    assert_stopped_in_one_line,
    contents,
    exit_codes,
    rows,
    run_here,
    run_ranks,
    start_ranks,
    steps,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as dcp_load

from trainer.checkpoint import read_manifest

SETTINGS = ("checkpoint.every=2", "train.max_steps=6", "train.epochs=900", "dist.strategy=fsdp")
ENDLESS = (*SETTINGS, "train.max_steps=4000", "train.schedule=constant")


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks that nothing disturbs, saved in the background."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(arguments(folder / "run", tiny_model_dir, *SETTINGS), folder) == [0, 0]
    return folder / "run"


def wait_for_rows(folder: Path, number: int, ranks: list[BaseProcess]) -> None:
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < number:
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.005)


# --- what two ranks write --------------------------------------------------------------------------------------------


def test_each_rank_writes_its_rows_and_torch_reads_them(whole: Path, tiny_model_dir: Path) -> None:
    step = whole / "checkpoints" / "step_6"
    files = [f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (1, 2)]
    assert sorted(path.name for path in step.iterdir()) == ["manifest.json", *files]
    assert sorted(json.loads((step / "manifest.json").read_text())["files"]) == files
    shapes = {name: tensor.shape for name, tensor in load_file(tiny_model_dir / "model.safetensors").items()}
    for name in files[:2]:
        with safe_open(step / name, framework="pt") as file:
            held = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
        assert held == pytest.approx(sum(shape.numel() for shape in shapes.values()) / 2, rel=0.01)
    found = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    found |= {f"exp_avg.{name}": torch.full(shape, float("nan")) for name, shape in shapes.items()}
    found |= {f"step.{name}": torch.tensor(float("nan")) for name in shapes}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp_load(found, storage_reader=HuggingFaceStorageReader(str(step)), no_dist=True)
    exported = load_file(whole / "export" / "model.safetensors")
    for name in shapes:
        assert torch.equal(found[name], exported[name]), name
        assert found[f"exp_avg.{name}"].isfinite().all() and found[f"step.{name}"] == 6


def test_a_save_in_the_background_changes_no_bit(whole: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = ("checkpoint.asynchronous=false", "checkpoint.every=3")
    assert run_ranks(arguments(tmp_path / "run", tiny_model_dir, *SETTINGS, *settings), tmp_path) == [0, 0]
    assert rows(tmp_path / "run") == rows(whole)
    for name in ("export", "checkpoints/step_6"):
        found, wanted = contents(tmp_path / "run" / name), contents(whole / name)
        assert found.keys() == wanted.keys()
        assert all(found[file] == wanted[file] for file in found if file != "manifest.json")


def test_one_rank_exports_what_two_have_trained(whole: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The rows of two ranks meet in one file, byte for byte that of a rank that holds everything."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(folder / "export")
    assert run_here(arguments(folder, tiny_model_dir, *SETTINGS, "dist.strategy=auto")) == 0
    assert contents(folder / "export") == contents(whole / "export")


def test_one_rank_goes_on_where_two_have_stopped(whole: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """No rank may keep rows of another number of ranks: 2 -> 1 here, more in test_dist_fsdp.py."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(folder / "export")
    shutil.rmtree(folder / "checkpoints" / "step_6")
    assert run_here(arguments(folder, tiny_model_dir, *SETTINGS, "dist.strategy=auto")) == 0
    assert [json.loads(row)["loss"] for row in rows(folder)] == pytest.approx(
        [json.loads(row)["loss"] for row in rows(whole)], rel=2e-5
    )
    assert sorted(path.name for path in (folder / "checkpoints" / "step_6").iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]


# --- what can go wrong -----------------------------------------------------------------------------------------------


def test_a_flipped_bit_that_the_second_rank_finds_leads_both_to_the_older_checkpoint(
    whole: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(folder / "export")
    path = folder / "checkpoints" / "step_6" / "optimizer-00002-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(bytes(raw))
    assert run_ranks(arguments(folder, tiny_model_dir, *SETTINGS), tmp_path) == [0, 0]
    said = (tmp_path / "rank_0").read_text(encoding="utf-8")
    assert f"passed over: {folder}/checkpoints/step_6: {path.name} differs from its sha256 in the manifest" in said
    assert f"resuming from {folder}/checkpoints/step_4 at step 4 of 6" in said
    assert "passed over" not in (tmp_path / "rank_1").read_text(encoding="utf-8")
    assert rows(folder) == rows(whole) and contents(folder / "export") == contents(whole / "export")


def test_one_fault_after_another(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Each rank killed, a disk full under one, one that hangs, a signal to one: the others end with one line, the same
    command goes on, and the rows are those of a run that nothing disturbs."""
    folder = tmp_path / "run"
    argv = arguments(folder, tiny_model_dir, *ENDLESS, "dist.timeout_s=5")
    again = "start the same command again to resume"

    def two_steps_on() -> list[BaseProcess]:
        before = len(rows(folder)) if (folder / "metrics.jsonl").exists() else 1
        ranks = start_ranks(argv, tmp_path)
        wait_for_rows(folder, before + 2, ranks)
        return ranks

    for lost in (1, 0):
        ranks = two_steps_on()
        ranks[lost].kill()
        codes = exit_codes(ranks)
        assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1
        line = f"{folder}: rank {1 - lost}: another rank has ended or cannot be reached; {again}"
        assert_stopped_in_one_line(tmp_path / f"rank_{1 - lost}", line)

    ranks = two_steps_on()
    resource.prlimit(ranks[1].pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert exit_codes(ranks) == [1, 1]
    for rank in (0, 1):
        line = "the checkpoint cannot be written (File too large); earlier ones are whole: free space and resume"
        assert_stopped_in_one_line(tmp_path / f"rank_{rank}", line)
    assert 1 <= len(steps(folder)) <= 2 and all(read_manifest(path) for path in (folder / "checkpoints").iterdir())

    ranks = two_steps_on()
    os.kill(ranks[1].pid, signal.SIGSTOP)  # type: ignore[arg-type]
    ranks[0].join(timeout=60)
    assert ranks[0].exitcode == 1
    ranks[1].kill()
    ranks[1].join()
    line = f"{folder}: rank 0: another rank did not answer within dist.timeout_s; {again}"
    assert_stopped_in_one_line(tmp_path / "rank_0", line)

    ranks = two_steps_on()
    os.kill(ranks[1].pid, signal.SIGTERM)  # type: ignore[arg-type]
    assert exit_codes(ranks) == [0, 0]
    done = len(rows(folder))
    said = (tmp_path / "rank_0").read_text(encoding="utf-8")
    assert f"{folder}: stopped after step {done} of 4000 (another rank)\nresume with: " in said
    assert f"step_{done}" in steps(folder) and not any(name.endswith(".tmp") for name in steps(folder))

    undisturbed = tmp_path / "undisturbed"
    ranks = start_ranks(arguments(undisturbed, tiny_model_dir, *ENDLESS), tmp_path)
    wait_for_rows(undisturbed, done, ranks)
    for process in ranks:
        process.kill()
    assert rows(folder) == rows(undisturbed)[:done]


def test_an_export_that_the_disk_refuses_ends_both_ranks(whole: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Rank 0 writes; what the other one sends after that has to go somewhere."""
    folder = tmp_path / "run"
    ranks = start_ranks(arguments(folder, tiny_model_dir, *SETTINGS), tmp_path)
    wait_for_rows(folder, 2, ranks)
    (folder / "export.tmp").write_text("a file where a folder should be")
    assert exit_codes(ranks) == [1, 1]
    for rank in (0, 1):
        assert_stopped_in_one_line(tmp_path / f"rank_{rank}", f"{folder}/export: the export cannot be written (File ex")
    assert run_ranks(arguments(folder, tiny_model_dir, *SETTINGS), tmp_path) == [1, 1]  # it is nobody's leftover
    (folder / "export.tmp").unlink()
    assert run_ranks(arguments(folder, tiny_model_dir, *SETTINGS), tmp_path) == [0, 0]
    assert rows(folder) == rows(whole) and contents(folder / "export") == contents(whole / "export")
