"""The rows of a run: `metrics.jsonl`, one JSON object a step, and TensorBoard files beside it.

Each step stands once: rows are written in order, and a resumed run first cuts those past its checkpoint. Floats are
written so that they read back to the same bits. NaN and infinity, which JSON lacks, are written as null. Only the rank
that holds the run's lock writes; reductions over ranks are over before a row comes here.
"""

import errno
import importlib.util
import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.errors import ConfigError, RunError, TrainingStopped

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to `run_dir/metrics.jsonl`, each flushed, so that a killed run keeps every finished one."""

    def __init__(self, run_dir: str | Path, *, tensorboard: str = "off") -> None:
        """tensorboard: "on" | "off" | "auto" (where it is installed); its files go to `run_dir/tensorboard`.

        Raises ConfigError when it is "on" and not installed.
        """
        self.path = Path(run_dir) / FILE_NAME
        self._file = None
        self._last_step = 0
        installed = tensorboard != "off" and importlib.util.find_spec("tensorboard") is not None
        if tensorboard == "on" and not installed:
            raise ConfigError("run.tensorboard", "on", "TensorBoard is not installed; pip install tensorboard")
        self._use_tensorboard = installed
        self._board: Any = None

    def cut_after(self, step: int) -> None:
        """Drop the rows past `step` (0: all) and a last row torn by a crash; the file is replaced by rename.

        Call it once, before the first row. Raises RunError when a whole row is not a row of ours.
        """
        assert self._file is None, "rows were written already"
        self._last_step = step
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunError(self.path, f"cannot be read ({error.strerror}); move it away") from None
        lines = content.splitlines(keepends=True)
        kept = b"".join(
            line
            for number, line in enumerate(lines, start=1)
            if line.endswith(b"\n") and _parse(line, number, self.path)["step"] <= step
        )
        if kept == content:
            return
        temporary = self.path.with_name(f"{FILE_NAME}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            raise RunError(self.path, f"cannot be written ({error.strerror}); free space and start again") from None

    def write(self, row: Mapping[str, float | int | str]) -> None:
        """Append one row; it needs `step`, which must grow from row to row. Raises TrainingStopped on a full disk."""
        step = int(row["step"])
        assert step > self._last_step, f"step {step} after step {self._last_step}"
        first_step, self._last_step = self._last_step + 1, step
        values = {name: _finite_or_none(row[name]) for name in sorted(row) if name != "step"}
        line = json.dumps({"step": step, **values}, allow_nan=False) + "\n"
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            if self._file.write(line.encode()) != len(line.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._use_tensorboard:
                self._write_to_board(step, row, first_step)
        except OSError as error:
            problem = f"{self.path}: step {step} cannot be written ({error.strerror})"
            raise TrainingStopped(f"{problem}; free space and start the same command again to resume") from None

    def close(self) -> None:
        """Close the files; a run that dies without it loses no row of metrics.jsonl."""
        for open_file in (self._file, self._board):
            if open_file is not None:
                open_file.close()

    def _write_to_board(self, step: int, row: Mapping[str, float | int | str], first_step: int) -> None:
        if self._board is None:
            # Optional, and slow to import: not before the first row.
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an earlier start wrote past the checkpoint.
            self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=first_step)
        for name, value in row.items():
            if name != "step" and not isinstance(value, str):
                self._board.add_scalar(name, value, step)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` (or of the run folder that holds it); null stays None.

    A last line without its end is left out: the run is writing it. Raises RunError naming file and line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(path, f"cannot be read ({error.strerror}); name a run folder or its {FILE_NAME}") from None
    lines = content.splitlines(keepends=True)
    return [_parse(line, number, path) for number, line in enumerate(lines, start=1) if line.endswith(b"\n")]


def peak_memory_mib() -> float:
    """Most memory this process has held at a time, MiB: on the GPU where one is in use, else resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: after fork and exec it still counts the parent's memory.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _finite_or_none(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row["step"], int):
            raise TypeError("step is not a whole number")
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}:{number}", f"is not a row of metrics ({error}); mend or move the file") from None
    return row
