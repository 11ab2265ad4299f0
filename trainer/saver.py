"""Saves while training goes on: a copy of this rank's state, and a thread that writes it.

The copy lies in CPU memory (pinned where the state is on a GPU) and is kept for the next save: as much again as masters
and both moments of this rank, 12 bytes a parameter that it holds in float32. Without it (checkpoint.asynchronous =
false) the tensors themselves are written, and training waits. The ranks meet in a process group of their own, so that
what they tell each other about files never mixes with the step's collectives. One save is under way at most.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from trainer import checkpoint, dist
from trainer.checkpoint import Manifest, State, Writers
from trainer.errors import RunError, TrainingStopped, UserError
from trainer.parts import Part


class Snapshot:
    """A copy of a state that stays as it was while training goes on; its buffers serve every save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, state: State) -> State:
        """The state's values in our buffers; on a GPU they are there after `wait`, for whoever comes first."""
        copy = State(*([self._keep(part) for part in parts] for parts in state))
        if any(part.tensor.is_cuda for parts in state for part in parts):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copy

    def wait(self) -> None:
        """Until the values are there. The next update may be queued before: the GPU does it after the copies."""
        if self._copied is not None:
            self._copied.synchronize()

    def _keep(self, part: Part) -> Part:
        buffer = self._buffers.get(part.name)
        if buffer is None:
            buffer = torch.empty_like(part.tensor, device="cpu", pin_memory=part.tensor.is_cuda)
            self._buffers[part.name] = buffer
        buffer.copy_(part.tensor, non_blocking=True)
        return part._replace(tensor=buffer)


class Saver:
    """The checkpoints of one run, on every rank. Use it with `with`: leaving it waits for the save under way."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        asynchronous: bool,
        saved_step: int = 0,
        writers: Writers = checkpoint.WHOLE,
        timeout_s: float = dist.TIMEOUT_S,
        on_failure: Callable[[str], None] = lambda problem: None,
    ) -> None:
        """folder: of the `step_N`. timeout_s: how long a rank waits for the others' files. on_failure: called by the
        thread of a save that failed; `wait` raises it. Every rank makes its Saver at the same point."""
        self.saved_step = saved_step
        """The step of the last checkpoint: where the run began, then what was given to `save`."""
        self._folder, self._keep_last, self._writers = folder, keep_last, writers
        self._on_failure = on_failure
        self._group = dist.side_group(timeout_s)
        self._snapshot = Snapshot() if asynchronous else None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._blocked_s = 0.0
        self._save_s: float | None = None

    def save(self, manifest: Manifest, state: State) -> None:
        """Save `state` as step `manifest.step`. The save before is waited for, and what made it fail is raised.

        state: this rank's; left alone on a rank that writes nothing.
        """
        started = time.perf_counter()
        self.wait()
        self.saved_step = manifest.step
        if self._writers.number is None:
            state = State([], [])
        if self._snapshot is None:
            self._write(manifest, state)
            self.wait()
        else:
            copy = self._snapshot.take(state)
            self._thread = threading.Thread(target=self._write, args=(manifest, copy), name="save", daemon=True)
            self._thread.start()
        self._blocked_s += time.perf_counter() - started

    def wait(self) -> None:
        """Until no save is under way. Raises TrainingStopped on every rank if it failed."""
        self._join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise TrainingStopped(str(failure)) if isinstance(failure, RunError) else failure

    def costs(self) -> dict[str, float]:
        """Seconds since the last call that training stood still for saves and, if one has ended since, what it took."""
        costs = {"perf/save_blocked_s": self._blocked_s}
        if self._save_s is not None:
            costs["perf/save_s"] = self._save_s
        self._blocked_s, self._save_s = 0.0, None
        return costs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, TrainingStopped | UserError):
            self._join()  # all ranks are here; after a lost rank or a second Ctrl-C nobody is waited for

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, manifest: Manifest, state: State) -> None:
        started = time.perf_counter()
        step = self._folder / f"step_{manifest.step}"
        try:
            if self._snapshot is not None:
                self._snapshot.wait()
            checkpoint.save(step, manifest, state, writers=self._writers, group=self._group)
            if dist.is_main():
                checkpoint.remove_old(self._folder, self._keep_last, step=manifest.step)
        except Exception as error:
            self._failure = error
            self._on_failure(str(error))
        self._save_s = time.perf_counter() - started
