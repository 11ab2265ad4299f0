"""The command behind `trainer/main.py`: config, data, run folder, run."""

from pathlib import Path

from trainer import dist, numerics
from trainer.checkpoint import read_manifest
from trainer.config import Config, load_config, to_toml
from trainer.errors import RunError
from trainer.loop import export_model, train
from trainer.metrics import MetricsWriter
from trainer.run_folder import RunLock, ensure_writable, find_latest_checkpoint, remove_leftovers
from trainer.startup import look_at_data, make_run, open_data, say


def main(argv: list[str]) -> None:
    """Train as `argv` says, resume, or say that the run is finished. Raises UserError for what the user can mend."""
    config = load_config(argv)
    numerics.keep_freed_memory()
    shard, held_out = open_data(config)
    folder = Path(config.run.dir)
    if not dist.is_main():
        _train(config, shard, held_out, None)
        return
    ensure_writable(folder)
    with RunLock(folder):
        remove_leftovers(folder)
        _train(config, shard, held_out, folder)


def _train(config: Config, shard, held_out, folder: Path | None) -> None:
    dist.start()
    try:
        resume_from = dist.broadcast_object(_resume_from(config) if dist.is_main() else None)
        run = make_run(config, shard, held_out, resume_from)
        if run.step == 0:
            say(to_toml(config))
            if dist.is_main():
                look_at_data(config, shard)
        else:
            say(f"resuming from {resume_from} at step {run.step} of {run.total_steps}")
        exported = dist.broadcast_object((Path(config.run.dir) / "export").is_dir())  # as rank 0 sees it
        if run.step >= run.total_steps and (exported or not config.run.export):
            say(f"finished: step {run.step} of {run.total_steps}, model in {Path(config.run.dir) / 'export'}")
            return
        metrics = None
        if folder is not None:
            (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
            metrics = MetricsWriter(folder, tensorboard=config.run.tensorboard)
            metrics.cut_after(run.step)
        train(run, metrics)
        if config.run.export:
            export_model(run)
            say(f"model: {Path(config.run.dir) / 'export'}")
    finally:
        dist.stop()


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
