"""Drawing in several processes: the same samples as in one, what goes wrong in one, and how they end."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from data_tools.errors import UserError
from data_tools.tokenizer import load_tokenizer
from eval.generate import Completion, Request, dealt, default_workers, generate
from eval.generate_workers import in_processes
from eval.sampling import SamplingOptions
from trainer.errors import TrainingStopped
from trainer.models.hf_weights import load_decoder

DRAWN = SamplingOptions(max_tokens=20, temperature=1.0, n=3)


def never() -> bool:
    return False


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(children())
    yield
    assert set(children()) <= before


def test_prompts_are_dealt_in_order_with_equal_tokens() -> None:
    lengths = (9, 1, 8, 2, 3, 3, 30)
    todo = [(Request(str(index), (7,) * length), (0,)) for index, length in enumerate(lengths)]
    hands = dealt(todo, 2)
    assert [[request.id for request, _ in hand] for hand in hands] == [["0", "3", "5"], ["1", "2", "4", "6"]]
    assert dealt(todo, 1) == [todo] and dealt([], 2) == [[], []]


@pytest.mark.parametrize(("prompts", "workers"), [(7, 2), (7, 3), (1, 2), (2, 3)])
def test_samples_are_those_of_one_process(prompts: int, workers: int, tiny_model_dir: Path) -> None:
    """In float32. With fewer prompts than processes, each begins with a part of a prompt's samples."""
    model, tokenizer = load_decoder(tiny_model_dir).requires_grad_(False), load_tokenizer(tiny_model_dir)
    requests = [Request(f"p{index}", tuple(range(5, 8 + 3 * index))) for index in range(prompts)]

    def drawn(workers: int) -> dict[tuple[str, int], Completion]:
        found = list(generate(model, tokenizer, requests, DRAWN, slots=6, workers=workers))
        assert len(found) == 3 * prompts
        return {(each.request_id, each.sample): each for each in found}

    alone, together = drawn(1), drawn(workers)
    assert {key: each.token_ids for key, each in together.items()} == {k: each.token_ids for k, each in alone.items()}
    for key, each in together.items():
        assert each.text == alone[key].text
        torch.testing.assert_close(each.logps, alone[key].logps, atol=1e-5, rtol=0)


def test_twice_is_the_same_to_the_last_bit(tiny_model_dir: Path) -> None:
    model, tokenizer = load_decoder(tiny_model_dir).requires_grad_(False), load_tokenizer(tiny_model_dir)
    requests = [Request(f"p{index}", tuple(range(5, 8 + 3 * index))) for index in range(9)]
    runs = [list(generate(model, tokenizer, requests, DRAWN, slots=4, workers=2)) for _ in range(2)]
    first, second = ({(each.request_id, each.sample): each for each in run} for run in runs)
    assert first == second


def test_what_a_process_raises_is_raised_here() -> None:
    def work(error: Exception, _: Callable[[], bool]) -> Iterator[int]:
        yield 1
        raise error

    for error, kind, words in (
        (UserError("prompt 'x': too long"), UserError, "^prompt 'x': too long$"),
        (ZeroDivisionError("by nothing"), RuntimeError, "ZeroDivisionError: by nothing"),
    ):
        found = []
        with pytest.raises(kind, match=words):
            for each in in_processes([partial(work, error)], never):
                found.append(each)
        assert found == [1]


def test_a_killed_process_is_said() -> None:
    def work(_: Callable[[], bool]) -> Iterator[int]:
        yield 1
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(TrainingStopped, match="ended with signal 9"):
        list(in_processes([work], never))


def counting(ended: Callable[[], bool]) -> Iterator[int]:
    number = 0
    while not ended():
        yield number
        number += 1
        time.sleep(0.001)


def test_stopping_and_closing_end_all_processes() -> None:
    found: list[int] = []
    for number in in_processes([counting, counting], lambda: len(found) > 20):
        found.append(number)
    assert len(found) > 20
    endless = in_processes([counting, counting], never)
    assert next(endless) == 0
    endless.close()  # type: ignore[attr-defined]


def flooding(ended: Callable[[], bool]) -> Iterator[bytes]:
    """More than a pipe holds, so that a process waits for its reader."""
    while not ended():
        yield bytes(1 << 20)


def test_closing_ends_processes_that_wait_to_be_read() -> None:
    """Each was forked while pipes of the ones before it were open, and must not keep them open."""
    endless = in_processes([flooding] * 3, never)
    assert len(next(endless)) == 1 << 20
    time.sleep(0.5)  # all pipes are full now
    closing = threading.Thread(target=endless.close, daemon=True)  # type: ignore[attr-defined]
    closing.start()
    closing.join(timeout=20)
    assert not closing.is_alive()


def silent(ended: Callable[[], bool]) -> Iterator[int]:
    """One number, then work that gives nothing: no pipe tells such a process that its parent is gone."""
    yield 0
    while not ended():
        time.sleep(0.01)


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """The parent is killed; its two processes notice that they have another parent."""
    parent = os.fork()
    if parent == 0:
        os.setsid()
        for _ in in_processes([silent, silent], never):
            (tmp_path / "begun").write_text(" ".join(children()))
        os._exit(0)
    while not (tmp_path / "begun").exists() or len(own := (tmp_path / "begun").read_text().split()) < 2:
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() for process in own):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_how_many_processes(tiny_model_dir: Path) -> None:
    model, threads = load_decoder(tiny_model_dir), torch.get_num_threads()
    assert default_workers(model, 8 * threads) == threads
    assert default_workers(model, 8 * threads - 1) == 1
