"""A wish to end a run early, and in good order: a signal, a torchrun that died, a save that failed.

A rank only notes its wish. The ranks agree in what they exchange every step anyway, so that all of them stop after the
same one.
"""

import os
import shlex
import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from trainer import dist

LONG_STEP_S = 10.0
"""Where steps take longer, the ranks also agree between micro-batches: torchrun kills 30 s after a signal."""


class StopRequest:
    """Has anybody asked this run to stop? With `with`, SIGTERM and SIGINT do; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why this rank would stop."""
        self.agreed = False
        """All ranks stop: they will not start another step."""
        self._before: dict[int, Any] = {}

    def ask(self, reason: str) -> None:
        """Note the wish; the first one counts. Any thread may call it."""
        self.reason = self.reason or reason

    def asked(self) -> bool:
        if dist.launcher_is_gone():
            self.ask("torchrun is gone")
        return self.reason is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.reason == name:
            raise KeyboardInterrupt
        self.ask(name)
        if dist.is_main():  # not print: the signal may have come in the middle of one
            os.write(2, f"\n{name}: saving, then stopping\n".encode())


def resume_command(argv: Sequence[str]) -> str:
    """The command that goes on with this run, as far as a worker knows it. argv: after trainer/main.py."""
    nodes, ranks = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    program = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        program = ["torchrun", f"--nproc-per-node={ranks}"]
    return shlex.join([*program, "trainer/main.py", *argv]) + (f" (on each of {nodes} nodes)" if nodes != "1" else "")
