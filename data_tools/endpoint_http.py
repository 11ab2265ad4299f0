"""One request to a server, until it is answered whole or cannot be: limits, timeouts, retries, and what to say then.

Used by `endpoint_client`, on its event loop. A key is held here and in the header that is sent, nowhere else: what is
quoted of a server is searched for it.
"""

import asyncio
import json
import random
import ssl
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from data_tools.endpoint_config import DEFAULT_KEY, EndpointConfig, Totals
from data_tools.endpoint_limits import MINUTE_S, Window, is_retried, retry_after_s
from data_tools.endpoint_request import Answer, MalformedAnswer, Usage, error_code, error_text, parse_answers
from data_tools.errors import UserError

UNSEEN_RETRIES = 4
"""Retries of a server that has never answered anything: more likely a wrong address than a moment of weakness."""
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of a 429 that waiting does not cure (OpenAI)."""
BYTES_PER_TOKEN, UNKNOWN_COMPLETION = 3, 512
"""For the token limit, before the true counts are known."""
QUOTED = 300
"""Characters of a server's words in a message."""


class EndpointError(UserError):
    """A request that got no answer: `url: prompt 'id': what happened; what to do`. fatal: no other one would either."""

    def __init__(self, url: str, id: str, problem: str, *, fatal: bool) -> None:
        self.fatal = fatal
        super().__init__(f"{url}: prompt '{id}': {problem}")


class Stopped(Exception):
    """Nothing more is to be asked."""


class _TryAgain(Exception):
    """What went wrong in a way that may pass. begun: the server may have done, and billed, the work."""

    def __init__(self, problem: str, *, begun: bool, unseen: bool = False, retry_after: float | None = None) -> None:
        self.problem, self.begun, self.unseen, self.retry_after = problem, begun, unseen, retry_after
        super().__init__(problem)


class Sender:
    """An HTTP client with the limits of the config, inside `async with`. Raises UserError without `httpx`."""

    def __init__(
        self, config: EndpointConfig, totals: Totals, key: str | None, draw: random.Random, stopped: asyncio.Event
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise UserError("asking a server needs the package httpx: pip install 'logratio[endpoints]'") from None
        self._httpx: Any = httpx
        self._config, self._totals, self._key, self._draw, self._stopped = config, totals, key, draw, stopped
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "logratio"}
        self._client = httpx.AsyncClient(
            headers=headers | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(config.read_s, connect=config.connect_s, pool=None),
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
            trust_env=not config.is_loopback,
        )
        self._requests = Window(config.requests_per_minute, MINUTE_S) if config.requests_per_minute else None
        self._tokens = Window(config.tokens_per_minute, MINUTE_S) if config.tokens_per_minute else None
        self._turn = asyncio.Lock()
        self._not_before = 0.0
        self._seen = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def send(self, body: Mapping[str, Any], id: str, wanted: int) -> list[Answer]:
        """The answer's choices: `wanted`, or fewer where the server gives fewer. Raises EndpointError, Stopped."""
        data = json.dumps(dict(body) | ({"n": wanted} if wanted > 1 else {})).encode()
        longest = body.get("max_tokens") or body.get("max_completion_tokens") or UNKNOWN_COMPLETION
        estimate = len(data) / BYTES_PER_TOKEN + wanted * longest
        retry = 0
        while True:
            spent = await self._wait_for_turn(estimate)
            try:
                answers, usage = await self._once(data, id)
            except _TryAgain as trouble:
                self._give_up_or_wait(trouble, retry, id)
                wait = self._config.retry.wait_s(retry, trouble.retry_after, self._draw)
                if trouble.retry_after is not None:  # the server is busy for everybody, not for this request
                    self._not_before = max(self._not_before, time.monotonic() + wait)
            else:
                self._count(usage, spent)
                return answers[:wanted]
            self._totals.retries += 1
            retry += 1
            await self._pause(wait)

    async def _once(self, data: bytes, id: str) -> tuple[list[Answer], Usage]:
        """Send once. Raises _TryAgain, or EndpointError for what another try would not mend."""
        httpx = self._httpx
        begun = True
        try:
            async with asyncio.timeout(self._config.total_s):
                async with self._client.stream("POST", self._config.url, content=data) as response:
                    self._seen = True
                    content = await self._read(response, id)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol) as error:
            self._refuse_certificate(error, id)
            raise _TryAgain(f"no connection ({self._words(error)})", begun=False, unseen=not self._seen) from None
        except TimeoutError:
            raise _TryAgain(f"no whole answer in {self._config.total_s:g} s", begun=begun) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _TryAgain(f"the answer broke off ({self._words(error)})", begun=begun) from None
        if response.is_success:
            return self._parsed(content, response.headers)
        raise self._trouble(response.status_code, response.headers, content, id)

    async def _read(self, response: Any, id: str) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > self._config.max_response_bytes:
                problem = f"the answer is longer than {self._config.max_response_bytes} bytes; lower max_tokens"
                raise EndpointError(self._config.url, id, problem, fatal=False)
        return bytes(content)

    def _parsed(self, content: bytes, headers: Mapping[str, str]) -> tuple[list[Answer], Usage]:
        try:
            return parse_answers(json.loads(content), api=self._config.api)
        except (ValueError, RecursionError):
            kind = headers.get("content-type", "no content type")
            problem = f"the answer is not whole JSON ({self._clean(kind)}: {self._clean(content[:QUOTED])!r})"
        except MalformedAnswer as error:
            problem = f"the answer is not as it should be: {self._clean(str(error))}"
        raise _TryAgain(problem, begun=True)

    def _trouble(self, status: int, headers: Mapping[str, str], content: bytes, id: str) -> Exception:
        """What an answer with an error's status means."""
        try:
            payload = json.loads(content)
        except (ValueError, RecursionError):
            payload = None
        said = self._clean(error_text(payload) or content)
        problem = f"answered {status}" + (f" ({said})" if said else "")
        if is_retried(status) and error_code(payload) not in NO_CREDIT:
            return _TryAgain(problem, begun=False, retry_after=retry_after_s(headers))
        remedy, fatal = self._remedy(status)
        return EndpointError(self._config.url, id, f"{problem}; {remedy}", fatal=fatal)

    def _remedy(self, status: int) -> tuple[str, bool]:
        """What to do about a status that is not tried again, and whether every other request would meet it too."""
        variable = DEFAULT_KEY if self._config.api_key_env is None else self._config.api_key_env
        if status == 401:
            if self._key:
                return f"check the key in the environment variable {variable}", True
            return "put the server's key into an environment variable and name it by api_key_env", True
        if status in (402, 429):
            return "no credit is left at this server", True
        if status == 403:
            return f"the key may not do this: check its rights and the model '{self._config.model}'", True
        if status in (404, 405):
            return f"does the base URL end as it should (often /v1), is there a model '{self._config.model}'?", True
        if status < 400:
            return "redirects are not followed: give the final address as base URL", True
        return "check this prompt's length and settings against what the server takes", False

    def _give_up_or_wait(self, trouble: _TryAgain, retry: int, id: str) -> None:
        """Raise EndpointError if another try makes no sense; else note what was lost."""
        policy = self._config.retry
        if trouble.retry_after is not None and trouble.retry_after > policy.longest_retry_after_s:
            problem = (
                f"{trouble.problem}; the server asks to come back in {trouble.retry_after:.0f} s: start again then"
            )
            raise EndpointError(self._config.url, id, problem, fatal=True)
        self._totals.lost_answers += trouble.begun
        tries = min(policy.retries, UNSEEN_RETRIES) if trouble.unseen and not self._seen else policy.retries
        if retry >= tries:
            remedy = "is the server up, is the address right?" if trouble.unseen else "start again later"
            problem = f"{trouble.problem}, {retry + 1} times; {remedy}"
            raise EndpointError(self._config.url, id, problem, fatal=trouble.unseen and not self._seen)

    def _refuse_certificate(self, error: BaseException, id: str) -> None:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                problem = f"its certificate is not trusted ({cause.verify_message}); name yours in SSL_CERT_FILE"
                raise EndpointError(self._config.url, id, problem, fatal=True) from None
            cause = cause.__cause__ or cause.__context__

    async def _wait_for_turn(self, tokens: float) -> list[float] | None:
        """Wait until the limits allow a request; returns what was counted against the token limit."""
        async with self._turn:
            while True:
                if self._stopped.is_set():
                    raise Stopped
                now = time.monotonic()
                wait = self._not_before - now
                if self._requests is not None:
                    wait = max(wait, self._requests.delay_s(now, 1))
                if self._tokens is not None:
                    wait = max(wait, self._tokens.delay_s(now, tokens))
                if wait <= 0:
                    break
                await self._pause(wait)
            if self._requests is not None:
                self._requests.spend(now, 1)
            return None if self._tokens is None else self._tokens.spend(now, tokens)

    def _count(self, usage: Usage, spent: list[float] | None) -> None:
        """Add a whole answer to the totals."""
        totals, config = self._totals, self._config
        totals.requests += 1
        totals.uncounted += usage.prompt_tokens is None or usage.completion_tokens is None
        prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
        totals.prompt_tokens += prompt
        totals.completion_tokens += completion
        if config.price_prompt is not None and config.price_completion is not None:
            money = (prompt * config.price_prompt + completion * config.price_completion) / 1e6
            totals.cost = (totals.cost or 0.0) + money
        if spent is not None and self._tokens is not None and prompt + completion > 0:
            self._tokens.correct(spent, prompt + completion)

    async def _pause(self, seconds: float) -> None:
        """Wait, unless nothing more is to be asked: then raise Stopped."""
        try:
            await asyncio.wait_for(self._stopped.wait(), max(0.0, seconds))
        except TimeoutError:
            return
        raise Stopped

    def _words(self, error: BaseException) -> str:
        return self._clean(str(error)) or type(error).__name__

    def _clean(self, text: str | bytes) -> str:
        """A server's words, fit for one line, short, and without the key."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= QUOTED else text[:QUOTED] + "..."
