"""What is asked of an OpenAI-compatible server and what it answers, as plain data: no network here.

Source of the fields: the OpenAI API reference (chat completions, completions), and what vLLM, SGLang, llama.cpp and
Ollama document of theirs. `body_of` builds a request, `request_digest` names it in the cache, `parse_answers` checks
what came back.
"""

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from data_tools.errors import UserError
from data_tools.samples import canonical_json, digest_of, messages_of
from data_tools.schema import Text

Api = Literal["chat", "completions"]
PATHS: dict[Api, str] = {"chat": "chat/completions", "completions": "completions"}
OURS = ("model", "messages", "prompt", "stream", "n", "temperature", "top_p", "max_tokens", "stop", "seed", "logprobs")
"""Fields of the body that have a setting of their own or a meaning here; `extra` may not hold them."""
_COUNTS = ("prompt_tokens", "completion_tokens")
NOT_FINISHED = ("abort", "error")
"""Reasons with which a server says that it broke off: half an answer."""


class SettingsError(UserError):
    """A sampling setting that is unknown or has a wrong value: `temperature: must be ..., got ...`."""


class MalformedAnswer(Exception):
    """An answer that is not what the API promises; `str()` says how. Asking again may help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample. What is None is not sent: the server's own default holds."""

    temperature: float | None = None
    """>= 0."""
    top_p: float | None = None
    """0 < top_p <= 1."""
    max_tokens: int | None = None
    """Longest completion, tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion and are not part of it."""
    seed: int | None = None
    """Sample k is asked for with seed + k; a server need not heed it."""
    logprobs: bool = False
    """Ask for the log-probs of the sampled tokens; a server that does not offer them gives none."""
    n: int = 1
    """Samples a prompt."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the body, sent as they are (top_k, min_p, max_completion_tokens, ...)."""

    def __post_init__(self) -> None:
        for name, (wanted, is_right) in _RULES.items():
            if not is_right(getattr(self, name)):
                raise SettingsError(f"{name}: must be {wanted}, got {getattr(self, name)!r}")
        taken = sorted(set(self.extra) & set(OURS))
        if taken:
            raise SettingsError(f"extra: '{taken[0]}' has a setting of its own or is not supported; remove it there")
        try:
            canonical_json(dict(self.extra))
        except (TypeError, ValueError) as error:
            raise SettingsError(f"extra: is not JSON ({error})") from None

    def changed(self, settings: Mapping[str, Any]) -> "Sampling":
        """These settings with those of a row instead (null: the server's default). Raises SettingsError."""
        names = [field.name for field in fields(self)]
        for name in settings:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                raise SettingsError(
                    f"unknown setting '{name}'; {hint}known are {', '.join(names)}; "
                    "other fields of the request's body go into 'extra'"
                )
        values = dict(settings)
        if isinstance(values.get("stop"), str):
            values["stop"] = (values["stop"],)
        elif isinstance(values.get("stop"), list):
            values["stop"] = tuple(values["stop"])
        blank = Sampling()
        return replace(self, **{k: getattr(blank, k) if v is None else v for k, v in values.items()})

    def digest(self, api: Api) -> str:
        """Names everything but n: more samples of a prompt are the same kind of samples."""
        return digest_of({"api": api} | {k: v for k, v in asdict(self).items() if k != "n"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt, how to sample and which of its samples are wanted."""

    id: str
    prompt: Text
    sampling: Sampling
    samples: tuple[int, ...] = (0,)
    prefix: str = ""
    """How the answer begins; what is asked for is the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One completion. prompt_tokens, completion_tokens: as the server counts, None where it does not say."""

    text: str
    finish_reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprobs: tuple[float, ...] | None = None
    """Nats of each token."""
    reasoning: str | None = None
    served_model: str | None = None
    """What the server calls the model that answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request, all its choices together; None where the server does not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def body_of(question: Question, *, model: str, api: Api, sample: int) -> dict[str, Any]:
    """The JSON body that asks for one sample. Raises UserError for messages where only a string can be sent.

    A prefix is the assistant's own last message, which a server that knows `continue_final_message` goes on with (vLLM,
    SGLang); behind a plain prompt it is the prompt's end, which any server goes on from.
    """
    sampling = question.sampling
    body: dict[str, Any] = {**sampling.extra, "model": model}
    if api == "chat":
        body["messages"] = messages_of(question.prompt)
        if question.prefix:
            body["messages"].append({"role": "assistant", "content": question.prefix})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
    elif isinstance(question.prompt, str):
        body["prompt"] = question.prompt + question.prefix
    else:
        raise UserError(f"prompt '{question.id}' is a list of messages: /completions takes a string; use the chat API")
    for name in ("temperature", "top_p", "max_tokens"):
        if getattr(sampling, name) is not None:
            body[name] = getattr(sampling, name)
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.seed is not None:
        body["seed"] = sampling.seed + sample
    if sampling.logprobs:
        body["logprobs"] = True if api == "chat" else 1
    return body


def request_digest(body: Mapping[str, Any], *, api: Api, sample: int) -> str:
    """sha256 (hex) of what is asked for, wherever it is sent: API, body of one sample, the sample's number."""
    return hashlib.sha256(canonical_json({"api": api, "body": body, "sample": sample}).encode()).hexdigest()


def parse_answers(payload: object, *, api: Api) -> tuple[list[Answer], Usage]:
    """The choices of a decoded answer, in the server's order, and the request's tokens. Raises MalformedAnswer."""
    if not isinstance(payload, dict):
        raise MalformedAnswer(f"expected a JSON object, got {type(payload).__name__}")
    choices = payload.get("choices")
    if not isinstance(choices, list):
        said = error_text(payload)
        raise MalformedAnswer(f"no 'choices' in the answer{': ' + said if said else ''}")
    if not choices:
        raise MalformedAnswer("'choices' is empty")
    usage = _usage(payload.get("usage"))
    served = payload.get("model") if isinstance(payload.get("model"), str) else None
    return [_answer(choice, api, usage, len(choices), served) for choice in choices], usage


def error_text(payload: object) -> str:
    """What a server says in an error's body, in its usual places; "" where there is nothing of the kind."""
    error = payload.get("error", payload.get("detail", payload.get("message"))) if isinstance(payload, dict) else None
    if isinstance(error, dict):
        error = error.get("message") or error.get("code") or error.get("type")
    return error if isinstance(error, str) else "" if error is None else canonical_json(error)


def error_code(payload: object) -> str:
    """The code or type of an error's body, "" where there is none."""
    error = payload.get("error") if isinstance(payload, dict) else None
    code = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    return code if isinstance(code, str) else ""


def _answer(choice: object, api: Api, usage: Usage, choices: int, served: str | None) -> Answer:
    if not isinstance(choice, dict):
        raise MalformedAnswer("a choice is not an object")
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or not reason:
        raise MalformedAnswer("a choice has no 'finish_reason'")
    if reason in NOT_FINISHED:
        raise MalformedAnswer(f"the server broke off (finish_reason '{reason}')")
    message = choice.get("message") if api == "chat" else choice
    if not isinstance(message, dict):
        raise MalformedAnswer("a choice has no 'message'")
    name = "content" if api == "chat" else "text"
    text = message.get(name)
    if text is None and reason != "stop" and api == "chat":
        text = ""  # cut off while it was thinking, or filtered: there is no text, and the reason says why
    if not isinstance(text, str):
        raise MalformedAnswer(f"a choice has no text in '{name}'")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    logprobs = _logprobs(choice.get("logprobs"))
    tokens = usage.completion_tokens if choices == 1 else None if logprobs is None else len(logprobs)
    return Answer(
        text=text,
        finish_reason=reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=tokens,
        logprobs=logprobs,
        reasoning=reasoning if isinstance(reasoning, str) else None,
        served_model=served,
    )


def _usage(value: object) -> Usage:
    counts: dict[str, Any] = value if isinstance(value, dict) else {}
    right = {name: counts[name] for name in _COUNTS if _is_whole(counts.get(name)) and counts[name] >= 0}
    return Usage(**right)


def _logprobs(value: object) -> tuple[float, ...] | None:
    """The chat form (content: [{logprob}]), which some servers use for completions too, or token_logprobs: [...]."""
    if not isinstance(value, dict):
        return None
    found: Sequence[object] | None = value.get("token_logprobs")
    if isinstance(value.get("content"), list):
        found = [entry.get("logprob") if isinstance(entry, dict) else None for entry in value["content"]]
    if not isinstance(found, list) or not all(_is_number(x) and math.isfinite(x) for x in found):
        return None
    return tuple(map(float, found))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_RULES: dict[str, tuple[str, Any]] = {
    "temperature": ("a number from 0", lambda x: x is None or (_is_number(x) and 0 <= x < math.inf)),
    "top_p": ("a number above 0 and at most 1", lambda x: x is None or (_is_number(x) and 0 < x <= 1)),
    "max_tokens": ("a whole number from 1", lambda x: x is None or (_is_whole(x) and x >= 1)),
    "stop": (
        "strings, none of them empty",
        lambda x: isinstance(x, tuple) and all(isinstance(s, str) and s for s in x),
    ),
    "seed": ("a whole number", lambda x: x is None or _is_whole(x)),
    "logprobs": ("true or false", lambda x: isinstance(x, bool)),
    "n": ("a whole number from 1", lambda x: _is_whole(x) and x >= 1),
    "extra": ("an object", lambda x: isinstance(x, Mapping)),
}
