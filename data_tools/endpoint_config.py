"""Which server, which model, and how to behave towards it; what a run has cost so far. Nothing is sent here."""

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from data_tools.endpoint_limits import RetryPolicy
from data_tools.endpoint_request import PATHS, Api
from data_tools.errors import UserError

DEFAULT_KEY = "OPENAI_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A server, a model on it, and how to behave towards it. Raises UserError for values that cannot be."""

    base_url: str
    """As far as the version: https://api.openai.com/v1, http://localhost:8000/v1."""
    model: str
    api: Api = "chat"
    api_key_env: str | None = None
    """Environment variable that holds the key; "" sends none. Default: OPENAI_API_KEY where it is set, which is sent
    over https or to this machine only."""
    concurrency: int = 8
    """Requests in flight."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Prompt and completion, estimated before and corrected after each answer."""
    connect_s: float = 10.0
    read_s: float = 600.0
    """Longest silence of the server."""
    total_s: float = 1200.0
    """Longest request, all in all."""
    samples_per_request: int = 1
    """Above 1 several samples of a prompt are asked for at once, by `n`: the prompt is billed once. Without a seed."""
    continue_final_message: bool = False
    """The server goes on with the assistant's own last message where it is asked to: rows may have a prefix."""
    max_response_bytes: int = 64 << 20
    price_prompt: float | None = None
    """Money per million tokens, in any currency."""
    price_completion: float | None = None
    max_cost: float | None = None
    """No request is sent once so much is spent; those in flight come on top."""

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        if self.api not in PATHS:
            raise UserError(f"api: must be one of {', '.join(PATHS)}, got {self.api!r}")
        if not self.model:
            raise UserError("model: is empty; give the name that the server knows the model by")
        for name in ("concurrency", "samples_per_request", "max_response_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.retry.retries < 0:
            raise UserError(f"retries: must be at least 0, got {self.retry.retries}")
        for name in ("requests_per_minute", "tokens_per_minute", "connect_s", "read_s", "total_s", "max_cost"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}: must be above 0, got {value}")
        if (self.price_prompt is None) != (self.price_completion is None):
            raise UserError("price_prompt, price_completion: give both or none")
        if self.max_cost is not None and self.price_prompt is None:
            raise UserError("max_cost: needs price_prompt and price_completion")

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"{self.base_url.rstrip('/')}/{PATHS[self.api]}"

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine: then no proxy stands between."""
        return urlsplit(self.base_url).hostname in LOOPBACK


@dataclass(kw_only=True)
class Totals:
    """What has happened so far; tokens and money are those of this run's own requests."""

    samples: int = 0
    """Handed out, from the cache or from the server."""
    cached: int = 0
    failed: int = 0
    requests: int = 0
    """Answered whole: what a server bills."""
    retries: int = 0
    lost_answers: int = 0
    """Retries after an answer that had begun or had time to: the server may bill these too."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Requests for which the server gave no counts; money and tokens are too low by these."""
    cost: float | None = None
    """None without prices."""


def read_key(config: EndpointConfig) -> str | None:
    """The server's key from the environment, or None. Raises UserError where it is missing or must not be sent."""
    name = DEFAULT_KEY if config.api_key_env is None else config.api_key_env
    key = os.environ.get(name) if name else None
    if not key:
        if config.api_key_env:
            raise UserError(f"the environment variable {name} is not set: put the server's key there")
        return None
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise UserError(f"the environment variable {name} holds a character that no key has (a line end, a space?)")
    if config.api_key_env is None and not config.is_loopback and not config.base_url.startswith("https://"):
        problem = f"{config.base_url} is not https: the key in {name} would be sent in the clear"
        raise UserError(f"{problem}; use https, or say which key by api_key_env ('' for none)")
    return key


def _check_url(url: str) -> None:
    """Raise UserError unless this is the base of an API; what may be secret in it is not repeated."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
        parts = urlsplit("")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UserError("base_url: has a user, a query or a fragment; give https://host/v1 and the key by api_key_env")
    if not known or not url.isprintable() or " " in url:
        raise UserError(f"base_url: expected an address like http://localhost:8000/v1, got {url!r}")
    for path in PATHS.values():
        if parts.path.rstrip("/").endswith("/" + path):
            raise UserError(f"base_url: ends in /{path}; leave that off, it is added")
