"""The client against a real server that misbehaves as told: nothing lost, nothing paid twice, the key never shown."""

import contextlib
import dataclasses
import json
import logging
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoint_fixtures import ask, config, texts
from endpoint_server import FaultyServer, closed_port

from data_tools.endpoint_cache import AnswerCache
from data_tools.endpoint_client import Endpoint
from data_tools.endpoint_config import EndpointConfig
from data_tools.endpoint_http import EndpointError
from data_tools.endpoint_limits import RetryPolicy
from data_tools.endpoint_request import Question, Sampling
from data_tools.errors import UserError
from data_tools.schema import Message

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _no_key_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[AnswerCache]:
    with contextlib.closing(AnswerCache(tmp_path / "answers.jsonl")) as opened:
        yield opened


# What happens, and whether the retries count as answers that may have been billed.
FAULTS = {
    "silent": 1, "reset": 1, "half": 1, "half_json": 1, "half_chunk": 1, "malformed": 1, "html": 1, "empty": 1,
    "no_reason": 1, "no_text": 1, "aborted": 1, "error_in_200": 1,
    "500": 0, "503": 0, "408": 0, "409": 0, "425": 0, "429": 0, "429:0.05": 0, "503:0.02": 0,
}  # fmt: skip


def test_every_fault_is_survived_and_no_answer_is_billed_twice(cache: AnswerCache) -> None:
    """The fault table, each fault twice in a row on a prompt of its own, all at once; then all again from the cache."""
    prompts = [*FAULTS, "fine", "also fine"]
    with FaultyServer({name: [name, name] for name in FAULTS}) as server:
        settings = config(server.url, concurrency=12)
        endpoint = Endpoint(settings, cache)
        found = texts(list(endpoint.results(ask(*prompts, n=1))))
        assert found == {(p, 0): f"{p.upper()} 10" for p in prompts}
        assert server.billed == {(p, 10): 1 for p in prompts}
        assert server.most_in_flight <= 12
        totals = endpoint.totals
        assert totals.retries == 2 * len(FAULTS) and totals.lost_answers == 2 * sum(FAULTS.values())
        assert (totals.samples, totals.requests, totals.cached, totals.failed) == (len(prompts), len(prompts), 0, 0)
        seen = len(server.requests)
        again = Endpoint(settings, cache)
        assert texts(list(again.results(ask(*prompts, n=1)))) == found
        assert len(server.requests) == seen and again.totals.cached == len(prompts) and again.totals.requests == 0


def test_silence_and_drops_without_end_are_cut_off(cache: AnswerCache) -> None:
    """The times are long for the two good answers, so that a busy machine does not cut them off too."""
    with FaultyServer({"slow": ["slow"], "drip": ["drip"]}) as server:
        endpoint = Endpoint(config(server.url, read_s=2.0, total_s=3.0), cache)
        assert texts(list(endpoint.results(ask("slow", "drip")))) == {("slow", 0): "SLOW 10", ("drip", 0): "DRIP 10"}
        assert server.billed == {("slow", 10): 1, ("drip", 10): 1}
    assert endpoint.totals.retries == endpoint.totals.lost_answers == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "answered 500 (status 500: your header was None), 4 times; start again later"),
        ("half", "the answer broke off"),
        ("html", 'not whole JSON (text/html: "<html>Welcome to the hotel\'s network</html>"), 4 times'),
        ("empty", "the answer is not as it should be: 'choices' is empty, 4 times"),
        ("error_in_200", "no 'choices' in the answer: upstream is overloaded"),
        ("400", "answered 400 (status 400: your header was None); check this prompt's length and settings"),
        ("422", "answered 422"),
        ("huge", "the answer is longer than 1000000 bytes"),
    ],
)
def test_a_request_that_fails_for_good_does_not_stop_the_others(fault: str, words: str, cache: AnswerCache) -> None:
    with FaultyServer({"bad": [fault] * 9}) as server:
        endpoint = Endpoint(config(server.url, max_response_bytes=1_000_000), cache)
        results = list(endpoint.results(ask("one", "bad", "two"), ordered=True))
    assert [r.answer and r.answer.text for r in results] == ["ONE 10", None, "TWO 10"]
    error = results[1].error
    assert isinstance(error, EndpointError) and not error.fatal and endpoint.totals.failed == 1
    assert str(error).startswith(f"{server.url}/chat/completions: prompt 'id-bad': ") and words in str(error)
    tries = 1 if fault in ("400", "422", "huge") else 4
    assert sum(body["messages"][0]["content"] == "bad" for body in server.requests) == tries


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "put the server's key into an environment variable"),
        ("402", "no credit is left"),
        ("403", "the key may not do this: check its rights and the model 'm'"),
        ("404", "does the base URL end as it should (often /v1), is there a model 'm'?"),
        ("quota", "answered 429 (pay first); no credit is left"),
        ("moved", "redirects are not followed"),
        ("429:900", "the server asks to come back in 900 s"),
    ],
)
def test_what_no_request_gets_past_ends_the_run_at_once(fault: str, words: str, cache: AnswerCache) -> None:
    with FaultyServer({"bad": [fault]}) as server:
        endpoint = Endpoint(config(server.url, concurrency=1), cache)
        handed_out = []
        with pytest.raises(EndpointError, match="prompt 'id-bad'") as caught:
            handed_out.extend(endpoint.results(ask("one", "bad", "two")))
            pytest.fail("no error")
        assert words in str(caught.value) and caught.value.fatal and endpoint.stop_reason == "errors"
        assert len(server.requests) == 2 and len(cache) == 1


def test_a_server_that_is_not_there_is_said_soon_and_waited_for_once_it_was_seen(cache: AnswerCache) -> None:
    port = closed_port()
    patient = RetryPolicy(retries=200, first_s=0.01, longest_s=0.05)
    settings = config(f"http://127.0.0.1:{port}/v1", retry=patient, concurrency=1)
    with pytest.raises(EndpointError, match=r"no connection .*, 5 times; is the server up, is the address right\?"):
        list(Endpoint(settings, cache).results(ask("one")))
    endpoint = Endpoint(settings, cache)
    results = endpoint.results(ask("one", "two", "three"), ordered=True)
    with FaultyServer(port=port):
        found = [next(results)]
    # The server is gone: the requests that follow are refused until it is back.
    while endpoint.totals.retries < 2:
        time.sleep(0.01)
    with FaultyServer(port=port):
        found += results
    assert [r.answer and r.answer.text for r in found] == ["ONE 10", "TWO 10", "THREE 10"]


def test_requests_hold_what_was_asked_for_and_answers_what_came(cache: AnswerCache) -> None:
    turns = (Message("system", "be brief"), Message("user", "why"))
    sampling = Sampling(
        temperature=0.5, top_p=0.9, max_tokens=1, stop=("\n",), seed=3, logprobs=True, n=2, extra={"top_k": 5}
    )
    chat = Question(id="a", prompt=turns, sampling=sampling, samples=(0, 1))
    plain = dataclasses.replace(chat, prompt="why")
    with FaultyServer() as server:
        got = list(Endpoint(config(server.url, concurrency=1), cache).results([chat]))
        got += list(Endpoint(config(server.url, concurrency=1, api="completions"), cache).results([plain]))
        with pytest.raises(UserError, match="prompt 'a' is a list of messages: /completions takes a string"):
            list(Endpoint(config(server.url, api="completions")).results([chat]))
    common = {"model": "m", "temperature": 0.5, "top_p": 0.9, "max_tokens": 1, "stop": ["\n"], "top_k": 5}
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why"}]
    assert server.requests == [
        common | {"messages": messages, "logprobs": True, "seed": 3},
        common | {"messages": messages, "logprobs": True, "seed": 4},
        common | {"prompt": "why", "logprobs": 1, "seed": 3},
        common | {"prompt": "why", "logprobs": 1, "seed": 4},
    ]
    for result, text in zip(got, ["WHY 3", "WHY 4"] * 2, strict=True):
        answer = result.answer
        assert answer is not None and (answer.text, answer.finish_reason) == (text, "length")
        assert (answer.prompt_tokens, answer.completion_tokens, answer.served_model) == (3, 2, "m-2025")
        assert answer.logprobs == (-0.5, -1.25)


def test_samples_of_a_prompt_are_entries_of_their_own_and_more_can_be_added(cache: AnswerCache) -> None:
    with FaultyServer() as server:
        list(Endpoint(config(server.url), cache).results(ask("q", n=2, seed=None)))
        endpoint = Endpoint(config(server.url), cache)
        # The same prompt under another name is the same request; the third sample is new.
        results = list(endpoint.results(ask("q", "q", n=3, seed=None)))
        assert len(results) == 6 and server.billed == {("q", None): 3} and len(cache) == 3
        assert (endpoint.totals.cached, endpoint.totals.requests) == (5, 1)
        # Elsewhere, or with another temperature
        with FaultyServer() as other:
            list(Endpoint(config(other.url), cache).results(ask("q", n=3, seed=None)))
            assert not other.requests
        list(Endpoint(config(server.url), cache).results(ask("q", n=3, seed=None, temperature=0.5)))
        assert len(cache) == 6


def test_several_samples_in_one_request(cache: AnswerCache) -> None:
    with FaultyServer() as server:
        settings = config(server.url, samples_per_request=3, price_prompt=1e6, price_completion=2e6, concurrency=1)
        list(Endpoint(settings, cache).results(ask("q", n=1, seed=None)))
        endpoint = Endpoint(settings, cache)
        results = list(endpoint.results(ask("q", n=5, seed=None, logprobs=False)))
        with pytest.raises(UserError, match="cannot be with a seed"):
            list(Endpoint(settings, cache).results(ask("q", n=2)))
    assert [body.get("n", 1) for body in server.requests] == [1, 2, 2]  # 0 is there: 1 and 2, then 3 and 4
    assert len(results) == 5 and len(cache) == 5 and endpoint.totals.cached == 1
    # two requests of 1 prompt token and 2 x 2 completion tokens, at 1 and 2 a token
    assert (endpoint.totals.prompt_tokens, endpoint.totals.completion_tokens, endpoint.totals.cost) == (2, 8, 18.0)
    assert all(r.answer is not None and r.answer.completion_tokens is None for r in results if not r.cached)


def test_order_progress_and_the_limit_of_money(cache: AnswerCache) -> None:
    seen: list[int] = []
    prompts = [f"p{i}" for i in range(20)]
    with FaultyServer({"p0": ["500", "500"]}) as server:
        endpoint = Endpoint(config(server.url), cache, progress=lambda totals: seen.append(totals.samples))
        results = list(endpoint.results(ask(*prompts), ordered=True))
        assert [r.question.prompt for r in results] == prompts
        assert len(seen) == 20 and seen == sorted(seen) and seen[-1] == 20
        priced = config(server.url, concurrency=1, price_prompt=0, price_completion=1e6, max_cost=5)
        endpoint = Endpoint(priced, cache)
        # 2 each: after three requests 6 are spent
        assert len(list(endpoint.results(ask(*prompts, seed=99)))) == 3
        assert (endpoint.totals.cost, endpoint.stop_reason) == (6.0, "max_cost")


def test_twenty_failures_are_enough(cache: AnswerCache) -> None:
    prompts = [f"p{i}" for i in range(60)]
    with FaultyServer({p: ["400"] for p in prompts}) as server:
        endpoint = Endpoint(config(server.url, concurrency=1), cache)
        results = list(endpoint.results(ask(*prompts)))
    assert len(results) == len(server.requests) == 20 and endpoint.stop_reason == "errors"


def test_a_pause_that_the_server_asks_for_holds_for_all(cache: AnswerCache) -> None:
    prompts = ["busy", *(f"p{i}" for i in range(20))]
    with FaultyServer({"busy": ["429:0.5"]}) as server:
        list(Endpoint(config(server.url, concurrency=2), cache).results(ask(*prompts)))
    assert len(server.arrivals) == 22
    # The other worker had at most a few answers before the 429 was read; without the pause it has them all.
    assert sum(when < server.arrivals[0] + 0.5 for when in server.arrivals) <= 6


def test_the_rate_limits_hold_at_the_server(cache: AnswerCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.endpoint_http.MINUTE_S", 0.4)
    # Bounds from below, from before the first request is sent: a slow machine only widens the times.
    with FaultyServer() as server:
        start = time.monotonic()
        list(Endpoint(config(server.url, requests_per_minute=3), cache).results(ask(*"abcdefg")))
        assert len(server.arrivals) == 7 and server.arrivals[-1] - start >= 0.8
        start = time.monotonic()
        # About 30 tokens each by the estimate (90 bytes / 3): two at once, then two
        list(Endpoint(config(server.url, tokens_per_minute=70), cache).results(ask(*"hijk", max_tokens=1)))
        assert server.arrivals[-1] - start >= 0.4


def test_the_key_is_sent_and_shown_nowhere(
    cache: AnswerCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    # The server repeats the header it was sent in its error messages.
    with FaultyServer({"a": ["500"], "b": ["400"], "c": ["401"]}) as server:
        endpoint = Endpoint(config(server.url, concurrency=1), cache)
        results = []
        with pytest.raises(EndpointError) as caught:
            for result in endpoint.results(ask("a", "b", "c")):
                results.append(result)
    assert [headers["authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 4
    shown = [repr(endpoint), repr(results), repr(vars(caught.value)), str(caught.value), repr(endpoint.totals)]
    assert "your header was Bearer ***" in str(caught.value) and "environment variable OPENAI_API_KEY" in shown[3]
    assert caught.value.__cause__ is None and caught.value.__suppress_context__ or caught.value.__context__ is None
    assert caplog.text and cache.path.stat().st_size > 0
    for text in (*shown, caplog.text, cache.path.read_text(encoding="utf-8")):
        assert KEY not in text
    assert KEY.encode() not in pickle.dumps(endpoint.config)


def test_which_key_is_sent_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", "other")
    with pytest.raises(UserError, match="would be sent in the clear") as caught:
        Endpoint(config("http://198.51.100.7/v1"))
    assert KEY not in str(caught.value)
    Endpoint(config("https://198.51.100.7/v1"))
    Endpoint(config("http://198.51.100.7/v1", api_key_env="OTHER_KEY"))
    with FaultyServer() as server:
        list(Endpoint(config(server.url, api_key_env="")).results(ask("a")))
        list(Endpoint(config(server.url, api_key_env="OTHER_KEY")).results(ask("a")))
    assert [headers.get("authorization") for headers in server.headers] == [None, "Bearer other"]
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        Endpoint(config(server.url, api_key_env="NO_SUCH_KEY"))
    monkeypatch.setenv("OTHER_KEY", f"{KEY}\n")
    with pytest.raises(UserError, match="holds a character that no key has") as caught:
        Endpoint(config(server.url, api_key_env="OTHER_KEY"))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_url": "localhost:8000"}, "expected an address like http://localhost:8000/v1"),
        ({"base_url": "ftp://host/v1"}, "expected an address like"),
        ({"base_url": "http://"}, "expected an address like"),
        ({"base_url": "http://host:99999/v1"}, "expected an address like"),
        ({"base_url": "http://host/v1/chat/completions"}, "leave that off"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "has a user, a query or a fragment"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "has a user, a query or a fragment"),
        ({"model": ""}, "model: is empty"),
        ({"concurrency": 0}, "concurrency: must be at least 1"),
        ({"read_s": 0}, "read_s: must be above 0"),
        ({"price_prompt": 1.0}, "give both or none"),
        ({"max_cost": 1.0}, "needs price_prompt and price_completion"),
        ({"retry": RetryPolicy(retries=-1)}, "retries: must be at least 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        EndpointConfig(**({"base_url": "http://localhost/v1", "model": "m"} | values))
    assert words in str(caught.value) and KEY not in str(caught.value)


def test_what_the_server_bills_is_json_lines_under_the_requests_digests(cache: AnswerCache) -> None:
    with FaultyServer() as server:
        list(Endpoint(config(server.url), cache).results(ask("q")))
    (line,) = cache.path.read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert row["answer"]["text"] == "Q 10"
    # sha256 of the canonical JSON below, by sha256sum: a change of it would make every cache worthless
    # {"api":"chat","body":{"messages":[{"content":"q","role":"user"}],"model":"m","seed":10},"sample":0}
    assert row["digest"] == "999d0b4309046f800cd239dd76e22ec3e2d31f268be3733495a3678e785b4d5c"
