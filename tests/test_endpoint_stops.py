"""The client when a run is stopped, interrupted or cancelled, and when two run at once: nothing paid twice."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoint_fixtures import ask, config, texts
from endpoint_server import FaultyServer

from data_tools.endpoint_cache import AnswerCache
from data_tools.endpoint_client import Endpoint
from data_tools.endpoint_request import Answer


@pytest.fixture(autouse=True)
def _no_key_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[AnswerCache]:
    with contextlib.closing(AnswerCache(tmp_path / "answers.jsonl")) as opened:
        yield opened


def test_ctrl_c_keeps_what_is_in_flight_and_the_cache_whole(cache: AnswerCache) -> None:
    prompts = [f"p{i}" for i in range(30)]
    with FaultyServer() as server:
        server.gate = threading.Event()
        endpoint = Endpoint(config(server.url), cache)
        results = endpoint.results(ask(*prompts))

        def interrupt() -> None:
            while len(server.requests) < 4:
                time.sleep(0.01)
            endpoint.stop()
            assert server.gate is not None
            server.gate.set()

        thread = threading.Thread(target=interrupt)
        thread.start()
        assert len(list(results)) == 4 and len(cache) == 4 and endpoint.stop_reason == "stopped"
        thread.join()
        # A consumer that walks away waits for what is paid for, and the next run pays for the rest alone.
        endpoint = Endpoint(config(server.url), cache)
        next(endpoint.results(ask(*prompts)))
        list(Endpoint(config(server.url), cache).results(ask(*prompts)))
    assert server.billed == {(p, 10): 1 for p in prompts}


def test_a_keyboard_interrupt_is_raised_once_what_is_in_flight_is_handed_out(cache: AnswerCache) -> None:
    prompts = [f"p{i}" for i in range(30)]
    found = []
    with FaultyServer() as server:
        server.gate = threading.Event()
        endpoint = Endpoint(config(server.url), cache)

        def interrupt() -> None:
            while server.held < 4:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            while endpoint.stop_reason is None:
                time.sleep(0.01)
            assert server.gate is not None
            server.gate.set()

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            for result in endpoint.results(ask(*prompts)):
                found.append(result)
        thread.join()
    assert len(found) == len(cache) == 4 and all(result.answer is not None for result in found)
    assert server.billed == {(result.question.prompt, 10): 1 for result in found}


def test_cancel_drops_what_is_in_flight(cache: AnswerCache) -> None:
    with FaultyServer({"a": ["slow"]}) as server:
        endpoint = Endpoint(config(server.url), cache)

        def cancel() -> None:
            while not server.requests:
                time.sleep(0.01)
            endpoint.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        assert list(endpoint.results(ask("a"))) == []
        thread.join()
        # What is stopped stays stopped; another one goes on.
        assert list(endpoint.results(ask("b"))) == [] and len(server.requests) == 1
        assert texts(list(Endpoint(config(server.url), cache).results(ask("a")))) == {("a", 0): "A 10"}


def test_two_runs_at_once_share_their_answers(tmp_path: Path) -> None:
    """Each with a cache of its own on the same file, as two processes have."""
    prompts = [f"p{i}" for i in range(12)]
    found: list[dict] = []
    with FaultyServer(delay_s=0.05) as server:

        def run() -> None:
            with contextlib.closing(AnswerCache(tmp_path / "answers.jsonl")) as own:
                found.append(texts(list(Endpoint(config(server.url), own).results(ask(*prompts)))))

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [{(p, 0): f"{p.upper()} 10" for p in prompts}] * 3
    assert server.billed == {(p, 10): 1 for p in prompts}


def test_an_answer_written_between_the_look_and_the_claim_is_taken(tmp_path: Path) -> None:
    class Beaten(AnswerCache):
        def claim(self, digest: str) -> bool:
            with contextlib.closing(AnswerCache(self.path)) as other:
                other.put(digest, Answer(text="of the other process", finish_reason="stop"))
            return super().claim(digest)

    with FaultyServer() as server, contextlib.closing(Beaten(tmp_path / "answers.jsonl")) as cache:
        found = texts(list(Endpoint(config(server.url), cache).results(ask("a", "b"))))
    assert found == {("a", 0): "of the other process", ("b", 0): "of the other process"} and not server.requests
