"""The folder of a run: who may write there, what a killed run left behind, which checkpoint is the newest whole one.

    run.dir/.lock                 held by the process that writes, with its id inside
            config.toml           trainer.config
            metrics.jsonl         trainer.metrics
            checkpoints/step_N/   trainer.checkpoint
            export/               trainer.export
            adapter/              trainer.lora_files

Whole folders appear by rename: `NAME.tmp` is one being written, `NAME.old` one being replaced.
"""

import fcntl
import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from trainer.checkpoint import read_manifest
from trainer.errors import CheckpointError, RunError

CHECKPOINTS = "checkpoints"
EXPORT = "export"
ADAPTER = "adapter"
LOCK_NAME = ".lock"


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


class RunLock:
    """The right to write to a run folder, for one process at a time; use it with `with`.

    A POSIX record lock: the system frees it when the process ends, however it ends, and a forked child does not hold on
    to it. It also ends when this process closes any handle of the file, so nothing else may open it. The file stays:
    removing it would let two processes lock two files of that name.
    """

    def __init__(self, run_dir: str | Path, *, wait_s: float = 30.0, warn: Callable[[str], None] = say) -> None:
        self.run_dir = Path(run_dir)
        self.wait_s = wait_s
        self._warn = warn
        self._file: io.FileIO | None = None

    def acquire(self) -> None:
        """Take the lock, waiting up to `wait_s` seconds. Raises RunError naming the process that holds it."""
        ensure_writable(self.run_dir)
        file = io.FileIO(self.run_dir / LOCK_NAME, "a+")
        deadline = time.monotonic() + self.wait_s
        waited = False
        while not _try_lock(file):
            holder = _read_holder(file)
            if time.monotonic() >= deadline:
                file.close()
                problem = f"in use by {holder} (waited {self.wait_s:g} s); stop it or choose another run.dir"
                raise RunError(self.run_dir, problem)
            if not waited:
                self._warn(f"{self.run_dir}: in use by {holder}, waiting up to {self.wait_s:g} s")
                waited = True
            time.sleep(min(0.1, self.wait_s / 10))
        file.truncate(0)
        file.write(str(os.getpid()).encode("ascii"))
        self._file = file

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def remove_leftovers(run_dir: str | Path) -> list[Path]:
    """Delete what a killed run was writing; call it with the lock held. Returns what is gone or back in place.

    `NAME.tmp` goes. `NAME.old` goes where NAME stands; else the rename was cut in half and it becomes NAME again.
    """
    run_dir = Path(run_dir)
    found = sorted((run_dir / CHECKPOINTS).glob("step_*"))
    found += sorted(path for name in (EXPORT, ADAPTER) for path in run_dir.glob(f"{name}.*"))
    changed = []
    for path in found:
        if path.suffix not in (".tmp", ".old") or not path.is_dir():
            continue
        if path.suffix == ".old" and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
        else:
            shutil.rmtree(path)
        changed.append(path)
    return changed


def find_checkpoints(run_dir: str | Path, *, warn: Callable[[str], None] = say) -> list[Path]:
    """The `checkpoints/step_N` with a whole manifest and files of the right sizes, newest first.

    A damaged one is left out, and named through `warn` if no newer one is whole. Raises CheckpointError when all are
    damaged: starting over would bury what may still be saved.
    """
    steps, whole = _steps(run_dir), []
    for path in steps:
        try:
            read_manifest(path)
        except CheckpointError as error:
            if not whole:
                warn(f"passed over: {error}")
        else:
            whole.append(path)
    if steps and not whole:
        raise none_whole(run_dir)
    return whole


def none_whole(run_dir: str | Path) -> CheckpointError:
    """There are checkpoints in the run folder, and none that can be used."""
    steps = _steps(run_dir)
    problem = f"none of its {len(steps)} checkpoints is whole; move them away to start over, or choose another run.dir"
    return CheckpointError(Path(run_dir) / CHECKPOINTS, problem)


def _steps(run_dir: str | Path) -> list[Path]:
    """The folders `checkpoints/step_N`, newest first."""
    found = (Path(run_dir) / CHECKPOINTS).glob("step_*")
    steps = [(int(match[1]), path) for path in found if (match := re.fullmatch(r"step_(\d+)", path.name))]
    return [path for _, path in sorted(steps, reverse=True)]


def ensure_writable(folder: str | Path) -> None:
    """Make `folder` if it is not there and see that files can be written to it. Raises RunError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise RunError(folder, "a file stands where a folder should be; move it or choose another folder") from None
    except OSError as error:
        raise RunError(folder, f"cannot be written to ({error.strerror}); choose another folder") from None


def write_file(path: str | Path, text: str) -> None:
    """Write a whole file by rename, so that an older one of that name stays until then. Raises RunError.

    What a symbolic link points to is replaced, not the link; a device or a pipe is written to.
    """
    target = temporary = Path(path)
    if not _is_device(path):
        target = target.resolve()
        temporary = Path(f"{target}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        if temporary != target:
            os.replace(temporary, target)
    except OSError as error:
        if temporary != target:
            temporary.unlink(missing_ok=True)
        raise RunError(path, f"cannot be written ({error.strerror}); give another file") from None


def ensure_file_writable(path: str | Path) -> None:
    """See before long work that its result can be written to the file `path`. Raises RunError."""
    if Path(path).is_dir():
        raise RunError(path, "is a folder; name a file")
    if not _is_device(path):
        ensure_writable(Path(path).resolve().parent)


def _is_device(path: str | Path) -> bool:
    """Something that is no file on a disk, such as /dev/null: a rename would put one in its place."""
    return Path(path).exists() and not Path(path).is_file()


def require_free_space(path: str | Path, num_bytes: int) -> None:
    """Raise RunError unless the disk of `path` (which need not exist yet) has `num_bytes` free."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        problem = f"needs {num_bytes / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free; free some space"
        raise RunError(path, problem)


def _try_lock(file: io.FileIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _read_holder(file: io.FileIO) -> str:
    """Who wrote the lock file; it is empty for a moment after the lock was taken."""
    pid = os.pread(file.fileno(), 32, 0).decode("ascii", "replace").strip()
    return f"process {pid}" if pid else "another process"
