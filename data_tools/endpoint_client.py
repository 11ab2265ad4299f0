"""Ask an OpenAI-compatible server for many samples: few at a time, tried again where that helps, paid for once.

Requests run in a thread of their own, on an event loop; answers are handed out to the caller as they come, or in order.
Answers that arrived whole are in the cache before anybody sees them. `httpx` (the extra "endpoints") does the HTTP.

Not done here: streaming answers, tools, pictures, redirects (an address is what the user wrote, nothing else).
"""

import asyncio
import dataclasses
import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data_tools.endpoint_cache import AnswerCache
from data_tools.endpoint_config import EndpointConfig, Totals, read_key
from data_tools.endpoint_http import EndpointError, Sender, Stopped
from data_tools.endpoint_request import Answer, Question, body_of, request_digest
from data_tools.errors import MAX_ERRORS, UserError

POLL_S = 0.2
"""How often to look whether another process has got the answer that it is asking for."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One sample's answer, or why there is none."""

    question: Question
    sample: int
    answer: Answer | None = None
    cached: bool = False
    error: EndpointError | None = None


class Endpoint:
    """A server at work. `results` may be called again; `totals` adds up. Raises UserError for a key that cannot be."""

    def __init__(
        self,
        config: EndpointConfig,
        cache: AnswerCache | None = None,
        *,
        progress: Callable[[Totals], None] | None = None,
        seed: int | None = None,
    ) -> None:
        """progress is called in the caller's thread before each result is handed out; seed fixes the jitter."""
        self.config, self.cache, self._progress = config, cache, progress
        self.totals = Totals(cost=None if config.price_prompt is None else 0.0)
        self._draw = random.Random(seed)
        self._key = read_key(config)
        self.stop_reason: str | None = None
        """Why nothing more is asked for, now and later: "stopped", "max_cost" or "errors"; else None."""
        self._run: _Run | None = None
        self._dropping = False

    def __repr__(self) -> str:
        return f"Endpoint({self.config!r})"

    def results(self, questions: Iterable[Question], *, ordered: bool = False) -> Iterator[Result]:
        """Yield a Result for every wanted sample, as they come or (`ordered`) in the questions' order.

        A request that fails for good is a Result with an error, and after 20 of them no more are asked. What no other
        request could get past (a refused key, an unknown model, no server) is raised as EndpointError once the answers
        in flight are in. Ctrl-C asks nothing more, hands out what is in flight and then raises KeyboardInterrupt; a
        second one drops what is in flight.
        """
        run = _Run(self, questions, self._key, self._draw)
        interrupted = False
        run.thread.start()
        run.ready.wait()
        self._run = run
        if self.stop_reason is not None:  # asked for before there was a run to tell
            self.cancel() if self._dropping else self.stop()
        try:
            while True:
                try:
                    item = run.out.get()
                except KeyboardInterrupt:
                    self.cancel() if interrupted else self.stop()
                    interrupted = True
                    continue
                if item is None:
                    break
                yield from self._hand_out(run.in_order(item) if ordered else item[1])
            yield from self._hand_out(run.left_over())
        finally:
            run.end(drop=self.cache is None)
            self._run = None
        if interrupted:
            raise KeyboardInterrupt
        if run.fatal is not None:
            raise run.fatal

    def stop(self) -> None:
        """Ask nothing more; what is in flight is still handed out. From any thread, or a signal handler."""
        self.stop_reason = self.stop_reason or "stopped"
        if self._run is not None:
            self._run.call(self._run.stopped.set)

    def cancel(self) -> None:
        """Drop what is in flight too. From any thread, or a signal handler."""
        self._dropping = True
        self.stop()
        if self._run is not None:
            self._run.call(self._run.cancel)

    def _hand_out(self, results: list[Result]) -> Iterator[Result]:
        for result in results:
            if self._progress is not None:
                self._progress(dataclasses.replace(self.totals))
            yield result


class _Run:
    """One call of `results`: a thread with an event loop, and as many workers on it as there may be requests."""

    def __init__(self, endpoint: Endpoint, questions: Iterable[Question], key: str | None, draw: random.Random) -> None:
        self.endpoint, self.config, self.totals = endpoint, endpoint.config, endpoint.totals
        self.cache = endpoint.cache
        self.tasks = enumerate(_tasks(questions, self.config))
        self.out: queue.SimpleQueue[tuple[int, list[Result]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._main, name="endpoint", daemon=True)
        self.fatal: BaseException | None = None
        self.stopped = asyncio.Event()
        if endpoint.stop_reason is not None:
            self.stopped.set()
        self._key, self._draw = key, draw
        self._loop: asyncio.AbstractEventLoop | None = None
        self.ready = threading.Event()
        self._workers: asyncio.Task[None] | None = None
        self._asking: dict[str, asyncio.Future[None]] = {}
        self._waiting: dict[int, list[Result]] = {}
        self._next = 0

    def in_order(self, item: tuple[int, list[Result]]) -> list[Result]:
        """What may be handed out in order now that this one is there."""
        self._waiting[item[0]] = item[1]
        found: list[Result] = []
        while self._next in self._waiting:
            found += self._waiting.pop(self._next)
            self._next += 1
        return found

    def left_over(self) -> list[Result]:
        """What came after a gap that nothing will fill."""
        return [result for _, results in sorted(self._waiting.items()) for result in results]

    def call(self, function: Callable[[], Any]) -> None:
        """Run a function on the loop, if there still is one."""
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            pass  # the loop has ended: nothing is in flight

    def cancel(self) -> None:
        if self._workers is not None:
            self._workers.cancel()

    def end(self, *, drop: bool) -> None:
        """Wait for what is in flight, or drop it: paid answers are worth the wait where a cache keeps them."""
        self.call(self.stopped.set)
        if drop:
            self.call(self.cancel)
        try:
            self.thread.join()
        except KeyboardInterrupt:
            self.call(self.cancel)
            self.thread.join()
            raise

    def _main(self) -> None:
        try:
            asyncio.run(self._drive())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: B902 - handed to the caller's thread, which raises it
            self.fatal = self.fatal or error
        finally:
            self.ready.set()
            self.out.put(None)

    async def _drive(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._workers = asyncio.current_task()
        self.ready.set()
        async with Sender(self.config, self.totals, self._key, self._draw, self.stopped) as sender:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.config.concurrency):
                    group.create_task(self._work(sender))

    async def _work(self, sender: Sender) -> None:
        try:
            while not self.stopped.is_set():
                task = next(self.tasks, None)
                if task is None:
                    return
                number, question = task
                self.out.put((number, await self._answer(sender, question)))
        except Stopped:
            return
        except Exception as error:  # what no other request would get past, or a fault of ours
            self.fatal = self.fatal or error
            self._halt("errors")

    def _halt(self, reason: str) -> None:
        self.endpoint.stop_reason = self.endpoint.stop_reason or reason
        self.stopped.set()

    async def _answer(self, sender: Sender, question: Question) -> list[Result]:
        """Results of one task's samples: from the cache, or asked for."""
        bodies = {
            k: body_of(question, model=self.config.model, api=self.config.api, sample=k) for k in question.samples
        }
        digests = {k: request_digest(body, api=self.config.api, sample=k) for k, body in bodies.items()}
        found: dict[int, tuple[Answer, bool]] = {}
        mine = await self._take(digests, found)
        try:
            while missing := [k for k in digests if k not in found]:
                if self.config.max_cost is not None and (self.totals.cost or 0.0) >= self.config.max_cost:
                    self._halt("max_cost")
                    break
                answers = await sender.send(bodies[missing[0]], question.id, wanted=len(missing))
                for k, answer in zip(missing, answers, strict=False):
                    if self.cache is not None:
                        self.cache.put(digests[k], answer)
                    found[k] = answer, False
        except Stopped:
            return self._results(question, found, None)
        except EndpointError as error:
            if error.fatal:
                raise
            return self._results(question, found, error)
        finally:
            self._give_back(mine)
        return self._results(question, found, None)

    def _results(
        self, question: Question, found: dict[int, tuple[Answer, bool]], error: EndpointError | None
    ) -> list[Result]:
        """A result for each sample that was found, and with an error for the others too."""
        results = [
            Result(question=question, sample=k, answer=found[k][0], cached=found[k][1])
            if k in found
            else Result(question=question, sample=k, error=error)
            for k in question.samples
            if k in found or error is not None
        ]
        self.totals.samples += len(found)
        self.totals.cached += sum(cached for _, cached in found.values())
        self.totals.failed += len(results) - len(found)
        if self.totals.failed >= MAX_ERRORS:
            self._halt("errors")
        return results

    async def _take(self, digests: dict[int, str], found: dict[int, tuple[Answer, bool]]) -> list[str]:
        """Fill `found` from the cache; returns the digests of the rest, which nobody else asks for meanwhile.

        In the order of the digests, so that two who want the same ones do not wait for each other.
        """
        mine: list[str] = []
        if self.cache is None:
            return mine
        try:
            for k, digest in sorted(digests.items(), key=lambda item: item[1]):
                while (answer := self.cache.get(digest)) is None:
                    if digest in self._asking:
                        await asyncio.wait([self._asking[digest]])
                    elif not self.cache.claim(digest):
                        await self._pause(POLL_S)
                    else:
                        self._asking[digest] = asyncio.get_running_loop().create_future()
                        mine.append(digest)
                        answer = self.cache.get(digest)  # written between the look and the claim
                        break
                if answer is not None:
                    found[k] = answer, True
        except BaseException:
            self._give_back(mine)
            raise
        return mine

    def _give_back(self, digests: list[str]) -> None:
        for digest in digests:
            self._asking.pop(digest).set_result(None)
            assert self.cache is not None
            self.cache.release(digest)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stopped.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped


def _tasks(questions: Iterable[Question], config: EndpointConfig) -> Iterator[Question]:
    """Questions cut into requests: one sample each, or up to samples_per_request."""
    for question in questions:
        size = config.samples_per_request
        if size > 1 and question.sampling.seed is not None:
            raise UserError("samples_per_request above 1 cannot be with a seed: each sample has a seed of its own")
        for start in range(0, len(question.samples), size):
            yield dataclasses.replace(question, samples=question.samples[start : start + size])
