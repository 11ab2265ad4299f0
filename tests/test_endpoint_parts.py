"""Parts of the client for servers without a network: the cache on disk, rates and waits, requests and answers."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.endpoint_cache import CAN_CLAIM, AnswerCache
from data_tools.endpoint_limits import RetryPolicy, Window, is_retried, retry_after_s
from data_tools.endpoint_request import Answer, MalformedAnswer, Question, Sampling, SettingsError, parse_answers
from data_tools.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def digest(k: int) -> str:
    return f"{k:064x}"


def answer(text: str, **more: Any) -> Answer:
    return Answer(text=text, finish_reason="stop", **more)


@settings(max_examples=40, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(0, 5), st.text()), max_size=6),
    cut=st.integers(0, 300),
    more=st.lists(st.tuples(st.integers(0, 5), st.text()), max_size=3),
)
def test_a_cut_file_keeps_its_whole_lines_and_can_be_added_to(
    entries: list[tuple[int, str]], cut: int, more: list[tuple[int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cache") / "answers.jsonl"
    with contextlib.closing(AnswerCache(path)) as cache:
        for k, text in entries:
            cache.put(digest(k), answer(text, logprobs=(-1.5,), completion_tokens=k))
        first = dict(reversed(entries))  # what is there stays
        assert {k: cache.get(digest(k)) for k in first} == {
            k: answer(text, logprobs=(-1.5,), completion_tokens=k) for k, text in first.items()
        }
    content = path.read_bytes()[: cut or None]
    path.write_bytes(content)
    whole = {int(json.loads(line)["digest"], 16) for line in content.split(b"\n")[:-1]}
    torn = int(bool(content) and not content.endswith(b"\n"))
    with contextlib.closing(AnswerCache(path)) as cache:
        assert {k for k in range(6) if cache.get(digest(k)) is not None} == whole and cache.damaged == torn
        for k, text in more:
            cache.put(digest(k), answer(text))
        after = whole | {k for k, _ in more}
        assert {k for k in range(6) if cache.get(digest(k)) is not None} == after
    with contextlib.closing(AnswerCache(path)) as cache:
        # the same again; the torn line is a damaged one between others now, unless only its end was missing
        assert {k for k in range(6) if cache.get(digest(k)) is not None} >= after and cache.damaged <= torn


def test_a_damaged_line_is_a_missing_answer_and_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with contextlib.closing(AnswerCache(path)) as cache:
        cache.put(digest(1), answer("one"))
        cache.put(digest(2), answer("two"))
    path.write_bytes(path.read_bytes().replace(b'"text": "one"', b'"text"= "one"') + b"no entry\n")
    assert path.stat().st_mode & 0o777 == 0o600
    for text in (None, "again"):
        with contextlib.closing(AnswerCache(path)) as cache:
            found = cache.get(digest(1))
            assert (found and found.text) == text and cache.get(digest(2)) == answer("two")
            assert cache.damaged == (2 if text is None else 1)
            cache.put(digest(1), answer("again"))
            assert cache.get(digest(1)) == answer("again")


def test_an_unusable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the cache of answers cannot be used"):
        AnswerCache(tmp_path)


WRITER = """
import sys; sys.path[0] = sys.argv[1]
from data_tools.endpoint_cache import AnswerCache
from data_tools.endpoint_request import Answer
cache = AnswerCache(sys.argv[2])
for k in range(int(sys.argv[3]), int(sys.argv[4])):
    assert cache.claim(f"{k:064x}")
    cache.put(f"{k:064x}", Answer(text="x" * 5000 + str(k), finish_reason="stop"))
    print(k, flush=True)
sys.stdin.read()
"""


def start_writer(path: Path, first: int, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(ROOT), str(path), str(first), str(last)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def test_processes_write_one_file_and_a_killed_one_leaves_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    writers = [start_writer(path, 0, 150), start_writer(path, 100, 250)]
    with contextlib.closing(AnswerCache(path)) as cache:
        for writer in writers:
            assert writer.stdout is not None
            # Claims of 100 to 149 are wanted by both: a process that does not get one ends with an error.
            while (line := writer.stdout.readline()) and int(line) % 50 != 49:
                pass
        if CAN_CLAIM:
            held = [k for k in range(250) if not cache.claim(digest(k))]
            assert {0, 100} & set(held)  # the one that did not end over the other's claims holds its own
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        # Claims end with the process, and every line is whole.
        assert all(cache.claim(digest(k)) for k in range(250))
        found = [k for k in range(250) if cache.get(digest(k)) is not None]
        assert len(found) >= 50 and cache.damaged == 0
        assert all(cache.get(digest(k)) == answer("x" * 5000 + str(k)) for k in found)
    lines = path.read_bytes().split(b"\n")
    assert len(lines) - 1 == len(found)


@pytest.mark.skipif(not CAN_CLAIM, reason="no open file description locks on this system")
def test_a_claim_is_for_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    one, two = AnswerCache(path), AnswerCache(path)
    assert one.claim(digest(1)) and not two.claim(digest(1)) and two.claim("f" * 64)
    one.release(digest(1))
    assert two.claim(digest(1)) and not one.claim(digest(1))
    two.close()
    assert one.claim(digest(1)) and one.claim("f" * 64)
    one.close()


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 40), min_size=1, max_size=30),
    amounts=st.lists(st.integers(1, 12), min_size=30, max_size=30),
)
def test_no_window_holds_more_than_the_limit_and_no_wait_is_longer_than_needed(
    gaps: list[float], amounts: list[int]
) -> None:
    window, now = Window(10), 0.0
    spent: list[tuple[float, int]] = []
    for gap, amount in zip(gaps, amounts, strict=False):
        now += gap
        wait = window.delay_s(now, amount)

        def load(at: float) -> int:
            return sum(a for when, a in spent if when + 60 > at)

        if wait > 0:  # a moment earlier would have been too early
            earlier = now + wait * (1 - 1e-9) - 1e-9
            assert load(earlier) + amount > 10
        now += wait
        assert window.delay_s(now + 1e-6, amount) <= 1e-5  # floats: the sum of now and wait may round down
        now += 1e-6
        assert load(now) + amount <= 10 or (amount > 10 and load(now) == 0)
        window.spend(now, amount)
        spent.append((now, amount))


def test_an_estimate_is_corrected_while_it_counts() -> None:
    window = Window(100)
    entry = window.spend(0.0, 90)
    assert window.delay_s(1.0, 20) == 59.0
    window.correct(entry, 30)
    assert window.delay_s(1.0, 20) == 0.0 and window.delay_s(1.0, 71) == 59.0
    assert window.delay_s(60.0, 100) == 0.0
    window.correct(entry, 500)
    assert window.delay_s(60.0, 100) == 0.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("", None), ("soon", None), ("nan", None), ("inf", None),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0), ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
    ],
)  # fmt: skip
def test_retry_after_in_seconds_or_as_a_date(value: str, seconds: float | None) -> None:
    now = datetime(2015, 10, 21, 7, 28, tzinfo=UTC)
    assert retry_after_s({"retry-after": value}, now) == seconds
    assert retry_after_s({}) is None


def test_waits_double_with_jitter_and_heed_the_server() -> None:
    draw, policy = random.Random(0), RetryPolicy(first_s=1.0, longest_s=10.0)
    for retry, longest in enumerate([1.0, 2.0, 4.0, 8.0, 10.0, 10.0]):
        waits = [policy.wait_s(retry, None, draw) for _ in range(200)]
        assert longest / 2 <= min(waits) < longest * 0.55 and longest * 0.95 < max(waits) <= longest
    assert 10 <= policy.wait_s(0, 10.0, draw) <= 11 and policy.wait_s(10**6, 0.0, draw) >= 5
    assert [s for s in range(300, 600) if is_retried(s)] == [408, 409, 425, 429, *range(500, 600)]


@pytest.mark.parametrize(
    ("settings_of_row", "words"),
    [
        ({"temprature": 1}, "unknown setting 'temprature'; did you mean 'temperature'?"),
        ({"top_k": 5}, "unknown setting 'top_k'; did you mean 'top_p'? known are temperature, "),
        ({"temperature": -1}, "temperature: must be a number from 0, got -1"),
        ({"temperature": True}, "temperature: must be a number from 0, got True"),
        ({"top_p": 0}, "top_p: must be a number above 0 and at most 1"),
        ({"max_tokens": 0}, "max_tokens: must be a whole number from 1"),
        ({"stop": [""]}, "stop: must be strings, none of them empty"),
        ({"n": 0}, "n: must be a whole number from 1"),
        ({"seed": 1.5}, "seed: must be a whole number"),
        ({"logprobs": 3}, "logprobs: must be true or false"),
        ({"extra": {"stream": True}}, "extra: 'stream' has a setting of its own or is not supported"),
        ({"extra": []}, "extra: must be an object"),
    ],
)
def test_settings_that_cannot_be_are_named(settings_of_row: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Sampling().changed(settings_of_row)
    assert words in str(caught.value)


def test_a_rows_settings_come_first_and_null_is_the_servers_default() -> None:
    base = Sampling(temperature=0.7, stop=("a",), n=3)
    assert base.changed({}) == base
    own = base.changed({"temperature": None, "stop": "b", "n": None, "extra": {"top_k": 1}})
    assert own == Sampling(stop=("b",), extra={"top_k": 1})
    assert base.digest("chat") == base.changed({"n": 9}).digest("chat") != base.digest("completions")
    assert base.digest("chat") != own.digest("chat")
    assert Question(id="a", prompt="p", sampling=own).samples == (0,)


def reply(**message: Any) -> dict[str, Any]:
    choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": "x"}}
    return {"choices": [choice | message]}


def test_answers_of_all_servers_are_understood() -> None:
    answers, usage = parse_answers(reply() | {"usage": None}, api="chat")
    assert answers == [Answer(text="x", finish_reason="stop")] and usage.prompt_tokens is None
    thinking = reply(finish_reason="length", message={"content": None, "reasoning_content": "hm"})
    assert parse_answers(thinking, api="chat")[0][0] == Answer(text="", finish_reason="length", reasoning="hm")
    # the chat form of log-probs in an answer of /completions, as llama.cpp gives it
    plain = {"choices": [{"text": "y", "finish_reason": "stop", "logprobs": {"content": [{"logprob": -1}]}}]}
    assert parse_answers(plain, api="completions")[0][0].logprobs == (-1.0,)
    nothing = {"choices": [{"text": "y", "finish_reason": "stop", "logprobs": {"token_logprobs": [None, -1.0]}}]}
    assert parse_answers(nothing, api="completions")[0][0].logprobs is None


@pytest.mark.parametrize(
    "payload",
    [
        None, [], "text", {}, {"choices": None}, {"choices": []}, {"choices": [1]}, {"error": "busy"},
        reply(finish_reason=None), reply(finish_reason=""), reply(finish_reason="error"), reply(message=None),
        reply(message={}), reply(message={"content": None}), reply(message={"content": ["parts"]}),
    ],
)  # fmt: skip
def test_half_an_answer_is_none(payload: object) -> None:
    with pytest.raises(MalformedAnswer):
        parse_answers(payload, api="chat")
