"""A small OpenAI-compatible server on a real socket of this machine that misbehaves as told, and counts what it bills.

`faults[prompt]` is a list of fault names, each used up by one request for that prompt; then it answers as it should.
The text of an answer is the prompt in capitals, a space and the request's seed. Whole answers are billed: `billed`
counts them by (prompt, seed). Bytes of faults are written as a network would break them, not through an HTTP library.
"""

import asyncio
import json
import socket
import struct
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

STATUS = {"400": "Bad Request", "401": "Unauthorized", "404": "Not Found", "422": "Unprocessable", "500": "Oh no"}
ENDLESS = 1 << 30


class FaultyServer:
    """Serves in a thread between `with` and its end; `url` is the API's base. port: 0 for any free one."""

    def __init__(self, faults: dict[str, list[str]] | None = None, *, port: int = 0, delay_s: float = 0.0) -> None:
        self.faults = {prompt: list(names) for prompt, names in (faults or {}).items()}
        self.delay_s = delay_s
        """Before each answer."""
        self.billed: Counter[tuple[str, int | None]] = Counter()
        self.requests: list[dict[str, Any]] = []
        """Bodies, in the order they came."""
        self.headers: list[dict[str, str]] = []
        self.arrivals: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self.gate: threading.Event | None = None
        """While this is an event that is not set, answers wait for it; `held` of them do."""
        self.held = 0
        self._port = port
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self._port)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False ends the connection."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.arrivals.append(time.monotonic())
        self.requests.append(body)
        self.headers.append(headers)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay_s)
            self.held += 1
            while self.gate is not None and not self.gate.is_set():
                await asyncio.sleep(0.005)
            self.held -= 1
            prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            waiting = self.faults.get(prompt)
            if waiting:
                return await self._fault(waiting.pop(0), writer, headers, self._answer(body, prompt))
            await _send(writer, "200 OK", self._answer(body, prompt))
            self.billed[prompt, body.get("seed")] += 1
            return True
        finally:
            self.in_flight -= 1

    def _answer(self, body: dict[str, Any], prompt: str) -> dict[str, Any]:
        text = f"{prompt.upper()} {body.get('seed')}"
        choice: dict[str, Any] = {"finish_reason": "length" if body.get("max_tokens") == 1 else "stop"}
        logprobs = None
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": text}
            logprobs = {"content": [{"token": "x", "logprob": -0.5}, {"token": "y", "logprob": -1.25}]}
        else:
            choice["text"] = text
            logprobs = {"tokens": ["x", "y"], "token_logprobs": [-0.5, -1.25]}
        if body.get("logprobs"):
            choice["logprobs"] = logprobs
        n = body.get("n", 1)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 2 * n}
        choices = [choice | {"index": i} for i in range(n)]
        return {"model": f"{body['model']}-2025", "choices": choices, "usage": usage}

    async def _fault(
        self, name: str, writer: asyncio.StreamWriter, headers: dict[str, str], answer: dict[str, Any]
    ) -> bool:
        name, _, value = name.partition(":")
        whole = json.dumps(answer).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        if name == "silent":
            return False
        if name == "reset":
            writer.write(head + b"Content-Length: %d\r\n\r\n" % len(whole) + whole[: len(whole) // 2])
            await writer.drain()
            await asyncio.sleep(0.02)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
            writer.transport.abort()
            return False
        if name in ("half", "half_json", "half_chunk"):
            half = whole[: len(whole) // 2]
            sizes = {"half": b"Content-Length: %d\r\n\r\n" % len(whole), "half_json": b"Connection: close\r\n\r\n"}
            chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(half)
            writer.write(head + sizes.get(name, chunked) + half)
            await writer.drain()
            return False
        if name == "slow":
            await asyncio.sleep(60)
        if name in ("drip", "huge"):
            writer.write(head + b"Content-Length: %d\r\n\r\n" % ENDLESS)
            while True:
                writer.write(b" " if name == "drip" else b" " * 65536)
                await writer.drain()
                await asyncio.sleep(0.03 if name == "drip" else 0)
        replies: dict[str, tuple[str, Any]] = {
            "malformed": ("200 OK", b'{"choices": [nonsense'),
            "empty": ("200 OK", answer | {"choices": []}),
            "no_reason": ("200 OK", answer | {"choices": [answer["choices"][0] | {"finish_reason": None}]}),
            "no_text": ("200 OK", answer | {"choices": [{"finish_reason": "stop", "message": {"content": None}}]}),
            "aborted": ("200 OK", answer | {"choices": [answer["choices"][0] | {"finish_reason": "abort"}]}),
            "error_in_200": ("200 OK", {"error": {"message": "upstream is overloaded", "code": 502}}),
        }
        if name == "html":
            await _send(writer, "200 OK", b"<html>Welcome to the hotel's network</html>", "Content-Type: text/html")
        elif name in replies:
            await _send(writer, *replies[name])
        elif name == "quota":
            await _send(writer, "429 No", {"error": {"message": "pay first", "code": "insufficient_quota"}})
        elif name == "moved":
            await _send(writer, "302 Found", b"", "Location: http://127.0.0.1:9/v1")
        else:  # a status, with Retry-After behind the colon
            said = {"error": {"message": f"status {name}: your header was {headers.get('authorization')}"}}
            extra = f"Retry-After: {value}" if value else "X-Nothing: 1"
            await _send(writer, f"{name} {STATUS.get(name, 'Later')}", said, extra)
        return True


async def _send(writer: asyncio.StreamWriter, status: str, body: Any, *headers: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers]
    if not any(line.startswith("Content-Type") for line in headers):
        lines.append("Content-Type: application/json")
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
    await writer.drain()


def closed_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
