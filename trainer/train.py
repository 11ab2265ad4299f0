"""The command behind `trainer/main.py`: config, data, run folder, run."""

from collections.abc import Sequence
from pathlib import Path

import torch

from data_tools.encode import Group
from data_tools.shards import Shard
from trainer import dist, numerics
from trainer.checkpoint import read_manifest
from trainer.config import Config, load_config, to_toml
from trainer.errors import RunError
from trainer.loop import Run, export_model, train
from trainer.metrics import MetricsWriter
from trainer.run_folder import (
    CHECKPOINTS,
    RunLock,
    ensure_writable,
    find_latest_checkpoint,
    remove_leftovers,
    require_free_space,
)
from trainer.startup import look_at_data, make_run, open_data, say, sorted_pairs_line


def main(argv: list[str]) -> None:
    """Train as `argv` says, resume, or say that the run is finished. Raises UserError for what the user can mend."""
    config = load_config(argv)
    numerics.prepare_process()
    device = dist.choose_device(config.run.device)
    shard, held_out = open_data(config)
    folder = Path(config.run.dir)
    if not dist.is_main():
        _train(config, device, shard, held_out, None)
        return
    ensure_writable(folder / CHECKPOINTS)
    with RunLock(folder):
        remove_leftovers(folder)
        _train(config, device, shard, held_out, folder)


def _train(config: Config, device: torch.device, shard: Shard, held_out: Sequence[Group], folder: Path | None) -> None:
    """`folder`: the run folder on the rank that writes there, None on the others."""
    dist.start(device)
    try:
        resume_from = dist.broadcast_object(_resume_from(config) if folder is not None else None)
        run = make_run(config, shard, held_out, resume_from)
        if run.step == 0:
            say(to_toml(config))
            if folder is not None:
                look_at_data(config, shard)
        else:
            say(f"resuming from {resume_from} at step {run.step} of {run.total_steps}")
        to_export = dist.broadcast_object(config.run.export and not (run.folder / "export").is_dir())  # for rank 0
        if run.step >= run.total_steps and not to_export:
            say(f"finished: step {run.step} of {run.total_steps}, all of it in {run.folder}")
            return
        if (line := sorted_pairs_line(run)) is not None:
            say(line)
        metrics = _open_metrics(run, folder) if folder is not None else None
        try:
            train(run, metrics)
        finally:
            if metrics is not None:
                metrics.close()
        if config.run.export:
            export_model(run)
            say(f"model: {run.folder / 'export'}")
    finally:
        dist.stop()


def _open_metrics(run: Run, folder: Path) -> MetricsWriter:
    """Cut the rows past the run's step, save the resolved config. Raises RunError, before a change where it can."""
    masters = sum(tensor.numel() * tensor.element_size() for tensor in run.masters.masters)
    require_free_space(folder, 4 * masters)  # one checkpoint (weights and two moments) and the export
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


def _resume_from(config: Config) -> Path | None:
    """The checkpoint to go on from, None for a fresh start. Raises RunError or CheckpointError."""
    folder = Path(config.run.dir)
    if config.run.resume == "auto":
        return find_latest_checkpoint(folder)
    if config.run.resume == "never":
        if find_latest_checkpoint(folder) is not None:
            raise RunError(
                folder, "holds checkpoints and run.resume is never; set another run.dir or delete the folder"
            )
        return None
    read_manifest(Path(config.run.resume))
    return Path(config.run.resume)
