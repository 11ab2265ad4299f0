"""One command of a pipeline, run so that nothing of it outlives the pipeline.

Between the pipeline and the command stands a guard, a small process in a session of its own, joined to the pipeline by
a pipe. If the pipe closes, the pipeline is gone (kill -9 included): the guard kills the command and everything that it
started, and only then ends. It inherits the pipeline's lock, so the next pipeline begins when all of them are gone.
Bytes in the pipe are signals to be passed on; the third one kills.

On Linux the guard is the reaper of the command's orphans, so that workers which left the command's process group are
found too. Elsewhere the process group is all that is killed.
"""

import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

if sys.platform == "linux":
    from data_tools import verify_sandbox_kernel as kernel

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 3
"""So many signals, then the command is killed."""


class StopSignals:
    """Notes Ctrl-C, SIGTERM and SIGHUP while `with` lasts, and passes them on to the command that runs."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._pipe = -1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self, pipe: int) -> None:
        """Signals go into this pipe, one that came just before too; -1: nowhere."""
        self._pipe = pipe
        if pipe >= 0 and self.asked:
            self._send(self.asked)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        if self._pipe >= 0:
            self._send(number)

    def _send(self, number: int) -> None:
        with suppress(OSError):  # the guard has just ended
            # What a terminal sends to all of its processes is SIGINT; a command knows SIGTERM better than SIGHUP.
            os.write(self._pipe, bytes([signal.SIGTERM if number == signal.SIGHUP else number]))


def run_guarded(command: Sequence[str], log: Path, stop: StopSignals) -> int:
    """Run a command, its output appended to `log`; returns its exit code, 128 + n where signal n ended it."""
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(write_end)
            for number in STOP_SIGNALS:  # a handler that does nothing: unlike "ignore", the command does not inherit it
                signal.signal(number, _pass)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            code = _guard(command, log, read_end)
        except BaseException:
            with open(log, "a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(read_end)
    stop.pass_on(write_end)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        stop.pass_on(-1)
        os.close(write_end)
    return code if code >= 0 else 128 - code


def _guard(command: Sequence[str], log: Path, pipe: int) -> int:
    """The guard's whole life."""
    os.setsid()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, _pass)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    if sys.platform == "linux":
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    with open(log, "ab") as file:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_guard,
            )
        except (OSError, ValueError) as error:
            file.write(f"{command[0]}: cannot be started: {error}\n".encode())
            return 127
    signals = 0
    while process.poll() is None:
        ready = select.select([pipe, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
        if pipe in ready:
            numbers = os.read(pipe, PATIENCE)
            if not numbers:
                break
            for number in numbers:
                signals += 1
                _signal_group(process.pid, signal.SIGKILL if signals >= PATIENCE else number)
    code = process.returncode
    _signal_group(process.pid, signal.SIGKILL)
    _kill_children()
    if code is None:
        return 1
    return code if code >= 0 else 128 - code


def _die_with_guard() -> None:
    """In the command, before it is loaded: should the guard itself be killed, so is the command."""
    if sys.platform == "linux":
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _kill_children() -> None:
    """Kill and await every child; a killed one's children become ours and follow."""
    while True:
        for pid in _children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    own, found = str(os.getpid()), []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # The name in brackets may hold anything; after it: state, parent.
            if (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1] == own:
                found.append(int(entry.name))
    return found


def _pass(number: int, frame: FrameType | None) -> None:
    pass
