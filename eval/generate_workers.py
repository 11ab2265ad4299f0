"""Iterators that run in forked processes, so that what the parent holds (a model's weights) is in memory once."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from trainer.errors import TrainingStopped, UserError

POLL_S = 0.1
"""How long the parent waits before it asks again whether it was asked to stop."""

Work = Callable[[Callable[[], bool]], Iterator[Any]]
_DONE = "done"


def in_processes(works: Sequence[Work], stopped: Callable[[], bool]) -> Iterator[Any]:
    """What each `work(stopped)` gives in a process of its own with one thread, as it comes.

    Their `stopped` is true when the parent's is, and when the parent is gone. Raises what a work raised, as UserError
    or, for our own bugs, RuntimeError; TrainingStopped for a process that was killed. Closing the iterator ends them.
    """
    context = multiprocessing.get_context("fork")
    ending, parent = context.Value("b", 0), os.getpid()

    def ended() -> bool:
        return bool(ending.value) or os.getppid() != parent or stopped()

    running: dict[Connection, Any] = {}
    try:
        for work in works:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(work, ended, sender, [*running, receiver]), daemon=True)
            process.start()
            sender.close()
            running[receiver] = process
        while running:
            if stopped():
                ending.value = 1
            for receiver in wait(list(running), timeout=POLL_S):
                kind, content = _receive(receiver, running[receiver])
                if kind is None:
                    yield content
                    continue
                running.pop(receiver).join()
                if kind is not _DONE:
                    raise kind(content)
    finally:
        ending.value = 1
        for receiver in running:  # all of them first: who waits for a reader learns that there is none
            receiver.close()
        for process in running.values():
            process.join()


def _run(work: Work, ended: Callable[[], bool], sender: Connection, receivers: Sequence[Connection]) -> None:
    """In a process: send each that comes, then how it ended. receivers: the parent's, which a fork opens here too."""
    for receiver in receivers:
        receiver.close()
    torch.set_num_threads(1)
    try:
        for each in work(ended):
            sender.send((None, each))
        sender.send((_DONE, None))
    except BrokenPipeError:  # the parent wants no more
        pass
    except UserError as error:
        sender.send((UserError, str(error)))
    except Exception:
        sender.send((RuntimeError, f"in a process that draws samples:\n{traceback.format_exc()}"))


def _receive(receiver: Connection, process: Any) -> tuple[Any, Any]:
    try:
        kind, content = receiver.recv()
    except EOFError:
        process.join()
        ending = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        return TrainingStopped, f"a process that draws samples ended with {ending}; is there too little memory?"
    return (_DONE if kind == _DONE else kind), content
