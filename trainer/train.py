"""The command behind `trainer/main.py`: config, data, run folder, run."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data_tools.encode import Group
from data_tools.shards import Shard
from trainer import adapt, dist, numerics
from trainer.checkpoint import find_damage, read_manifest
from trainer.config import Config, load_config, to_toml
from trainer.dry_run import dry_run
from trainer.errors import CheckpointError, RunError, TrainingStopped
from trainer.export import planned_entries
from trainer.loop import Run, train, write_results
from trainer.metrics import MetricsWriter
from trainer.models.hf_weights import hf_name
from trainer.parts import parts_of
from trainer.run_folder import (
    ADAPTER,
    CHECKPOINTS,
    EXPORT,
    RunLock,
    ensure_writable,
    find_checkpoints,
    none_whole,
    remove_leftovers,
    require_free_space,
)
from trainer.startup import look_at_data, make_run, open_data, say, sorted_pairs_line
from trainer.stop import resume_command


def main(argv: list[str]) -> None:
    """Train as `argv` says, resume, or say that the run is finished. Raises UserError for what the user can mend."""
    config = load_config(argv)
    if config.run.dry_run:
        dry_run(config)
        return
    numerics.prepare_process()
    device = dist.choose_device(config.run.device)
    shard, held_out = open_data(config)
    folder = Path(config.run.dir)
    if not dist.is_main():
        _with_ranks(config, device, lambda: _train(config, argv, shard, held_out, None, []))
        return
    ensure_writable(folder / CHECKPOINTS)
    with RunLock(folder):
        remove_leftovers(folder)
        found = _checkpoints(config)
        _with_ranks(config, device, lambda: _train(config, argv, shard, held_out, folder, found))


def _with_ranks(config: Config, device: torch.device, work: Callable[[], None]) -> None:
    """Do `work` as one of the ranks. When another one dies or hangs, this process ends with one line that says so."""
    try:
        dist.start(device, config.dist.timeout_s)
        work()
    except Exception as error:
        if (problem := dist.lost_rank(error)) is None:
            raise
        again = "start the same command again to resume"
        print(f"stopped: {config.run.dir}: rank {dist.rank()}: {problem}; {again}", file=sys.stderr, flush=True)
        # no orderly end: threads may still wait for that rank in the process group
        os._exit(1)
    finally:
        dist.stop()


def _train(
    config: Config,
    argv: list[str],
    shard: Shard,
    held_out: Sequence[Group],
    folder: Path | None,
    checkpoints: list[Path],
) -> None:
    """`folder`, `checkpoints`: the run folder and what to go on from, on the rank that writes there alone."""
    resume_from = choose_checkpoint(config, checkpoints)
    run = make_run(config, shard, held_out, resume_from)
    if config.lora.enabled:
        adapt.check_results(config, run.model)
    elif config.run.export:
        planned_entries(parts_of((hf_name(name), tensor) for name, tensor in run.weights()), config.model.path)
    if run.step == 0:
        say(to_toml(config))
        for note in adapt.notes(config):
            say(note)
        if folder is not None:
            look_at_data(config, shard)
    else:
        say(f"resuming from {resume_from} at step {run.step} of {run.total_steps}")
    to_write = dist.broadcast_object(not all((run.folder / name).is_dir() for name in results(config)))  # for rank 0
    if run.finished and not to_write:
        say(f"finished: step {run.step} of {run.total_steps}, all of it in {run.folder}")
        return
    if (line := sorted_pairs_line(run)) is not None:
        say(line)
    metrics = _open_metrics(run, folder) if folder is not None else None
    try:
        with run.stop:
            train(run, metrics)
    finally:
        if metrics is not None:
            metrics.close()
    if run.stop.agreed:
        _say_stopped(run, argv)
    else:
        if run.solved:
            say(f"step {run.step} of {run.total_steps}: the last {run.solved_steps} were solved, so the run ends here")
        for path in write_results(run):
            say(f"{'adapter' if path.name == ADAPTER else 'model'}: {path}")


def results(config: Config) -> list[str]:
    """Names of the folders that a finished run leaves."""
    found = [ADAPTER] if config.lora.enabled else []
    return [*found, EXPORT] if config.run.export and (config.lora.merge or not config.lora.enabled) else found


def _say_stopped(run: Run, argv: list[str]) -> None:
    """Raises TrainingStopped where nobody asked for the end, but torchrun died."""
    if dist.launcher_is_gone():
        raise TrainingStopped(f"{run.folder}: torchrun is gone; start the same command again to resume")
    say(f"{run.folder}: stopped after step {run.step} of {run.total_steps} ({run.stop.reason or 'another rank'})")
    say(f"resume with: {resume_command(argv)}")


def choose_checkpoint(config: Config, found: list[Path]) -> Path | None:
    """On every rank, the first of those that rank 0 found whose files are as they were written; None if it found none.

    Each rank hashes its share of the files. A damaged one is named and passed over. Raises CheckpointError when none is
    left, or for the one the user named.
    """
    found = dist.broadcast_object(found)
    for path in found:
        damage = dist.first_failure(find_damage(path, rank=dist.rank(), world_size=dist.world_size()))
        if damage is None:
            return path
        if config.run.resume != "auto":
            raise CheckpointError(path, damage)
        if dist.is_main():
            print(f"passed over: {path}: {damage}", file=sys.stderr, flush=True)
    if found:
        raise none_whole(config.run.dir)
    return None


def _checkpoints(config: Config) -> list[Path]:
    """What this run may go on from, the best first; empty for a fresh start. Raises RunError or CheckpointError."""
    folder = Path(config.run.dir)
    if config.run.resume == "auto":
        return find_checkpoints(folder)
    if config.run.resume == "never":
        if find_checkpoints(folder):
            raise RunError(
                folder, "holds checkpoints and run.resume is never; set another run.dir or delete the folder"
            )
        return []
    read_manifest(Path(config.run.resume))
    return [Path(config.run.resume)]


def _open_metrics(run: Run, folder: Path) -> MetricsWriter:
    """Cut the rows past the run's step, save the resolved config. Raises RunError, before a change where it can."""
    masters = sum(tensor.numel() * tensor.element_size() for tensor in run.masters.masters)
    merged = adapt.merged_bytes(run.config)
    require_free_space(folder, 4 * masters + merged)  # one checkpoint (weights and two moments) and the export
    config = folder / "config.toml"
    if config.is_dir():
        raise RunError(config, "is a folder where the run writes a file; move it away")
    metrics = MetricsWriter(folder, tensorboard=run.config.run.tensorboard)
    metrics.cut_after(run.step)
    try:
        config.write_text(to_toml(run.config), encoding="utf-8")
    except OSError as error:
        raise RunError(config, f"cannot be written ({error.strerror}); free space and start again") from None
    return metrics
