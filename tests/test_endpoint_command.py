"""`python -m data_tools.endpoint`: prompts to samples, on the same test server; resume, refusals and signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import FaultyServer

from data_tools.endpoint import main
from data_tools.samples import SampleWriter, digest_of, read_samples, row_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


def write_prompts(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(server: FaultyServer, prompts: Path, out: Path, *more: str) -> list[str]:
    return ["--url", server.url, "--model", "m", "--prompts", str(prompts), "--out", str(out), "--seed", "1", *more]


def texts(path: Path) -> dict[tuple[str, int], str]:
    return {sample.key: sample.text for sample in read_samples(path).samples}


def test_prompts_become_samples_and_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts = write_prompts(
        tmp_path,
        [
            {"id": "a", "prompt": "why", "settings": {"n": 3}},
            {"id": "b", "messages": [{"role": "user", "content": "how"}]},
            {"id": "c", "prompt": "bad", "settings": {"temperature": 0.5}},
        ],
    )
    out, money = tmp_path / "new" / "s.jsonl", ("--price-prompt", "1000", "--price-completion", "2000")
    with FaultyServer({"bad": ["400"], "how": ["500"]}) as server:
        assert main(command(server, prompts, out, "--n", "2", *money)) == 2
        shown = capsys.readouterr()
        # 6 requests of 3 prompt and 2 completion tokens, at 1000 and 2000 a million: 6 * (0.003 + 0.004)
        assert (
            shown.out
            == (
                f"5 of 7 samples in {out}: 0 were there, 0 from the cache, 5 asked for; "
                "15 prompt and 10 completion tokens; cost 0.0000; 1 retries; 1 failed\n"
            )
            or "6 of 7" in shown.out
        )
        assert "failed: http://127.0.0.1:" in shown.err and "prompt 'c': answered 400" in shown.err
        last = shown.err.splitlines()[-1]
        assert last.startswith("error: ") and "the same command asks for them again" in last
        # killed inside a row, as if
        out.write_bytes(out.read_bytes()[:-9])
        assert main(command(server, prompts, out, "--n", "2")) == 0
        assert "1 from the cache, 1 asked for" in (shown := capsys.readouterr().out) and "a torn last row" in shown
        wanted = {("a", 0): "WHY 1", ("a", 1): "WHY 2", ("a", 2): "WHY 3", ("b", 0): "HOW 1", ("b", 1): "HOW 2"}
        assert texts(out) == wanted | {("c", 0): "BAD 1", ("c", 1): "BAD 2"}
        assert all(count == 1 for count in server.billed.values()) and len(server.billed) == 7
        # More samples are added, nothing that is there is asked for: not even the cache is needed.
        assert main(command(server, prompts, out, "--n", "4", "--no-cache")) == 0
        assert all(count == 1 for count in server.billed.values()) and len(server.billed) == 11
        # Another file, the same requests
        assert main(command(server, prompts, tmp_path / "other.jsonl", "--n", "2")) == 0
        assert "7 from the cache, 0 asked for" in capsys.readouterr().out
    first = read_samples(out).samples[0]
    assert (first.finish_reason, first.model, first.completion_tokens) == ("stop", "m", 2)
    by_id = {sample.id: sample for sample in read_samples(out).samples}
    assert by_id["a"].prompt_digest == digest_of("why")
    assert by_id["a"].settings_digest == by_id["b"].settings_digest != by_id["c"].settings_digest


def test_a_file_of_other_samples_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts, out = write_prompts(tmp_path, [{"id": "a", "prompt": "why"}]), tmp_path / "s.jsonl"
    with FaultyServer() as server:
        assert main(command(server, prompts, out)) == 0
        for changed, words in [
            (["--temperature", "0.5"], "another settings"),
            (["--model", "x"], "another model ('m')"),
            (["--api", "completions", "--model", "x"], "another model ('m') and settings"),
        ]:
            assert main(command(server, prompts, out, *changed)) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error == f"error: {out}: sample 0 of id 'a' was drawn with {words}; name another --out"
        write_prompts(tmp_path, [{"id": "a", "prompt": "why not"}])
        assert main(command(server, prompts, out)) == 2
        assert "drawn with another prompt;" in capsys.readouterr().err
        with SampleWriter(out):
            assert main(command(server, prompts, out)) == 2
        assert "another process is writing it" in capsys.readouterr().err
    assert texts(out) == {("a", 0): "WHY 1"}


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        (
            {"settings": {"temprature": 1}},
            [],
            "p.jsonl:1: field 'settings': unknown setting 'temprature'; did you mean",
        ),
        ({"messages": 3}, [], "p.jsonl:1: field 'messages': expected a string or a list"),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            ["--api", "completions"],
            "p.jsonl:1: field 'prompt': prompt 'p.jsonl:1' is a list of messages",
        ),
        ({"prompt": "x"}, ["--extra", "{"], "--extra: is not JSON"),
        ({"prompt": "x"}, ["--top-p", "2"], "top_p: must be a number above 0 and at most 1, got 2.0"),
        ({"prompt": "x"}, ["--samples-per-request", "2"], "p.jsonl:1: field 'settings': seed: cannot be with"),
        ({"prompt": "x"}, ["--url", "localhost"], "base_url: expected an address"),
        ({"prompt": "x"}, ["--api-key-env", "NO_SUCH"], "the environment variable NO_SUCH is not set"),
        ({"prompt": "x"}, ["--rpm", "0"], "requests_per_minute: must be above 0"),
    ],
)
def test_wrong_input_is_one_line_and_sends_nothing(
    row: dict[str, Any], more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = row if len(row) > 0 and set(row) != {"settings"} else {"prompt": "x"} | row
    with FaultyServer() as server:
        assert main(command(server, write_prompts(tmp_path, [row]), tmp_path / "s.jsonl", *more)) == 2
        assert not server.requests
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error


def test_the_limit_of_money_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompts, out = write_prompts(tmp_path, [{"prompt": "why"}]), tmp_path / "s.jsonl"
    money = ("--price-prompt", "0", "--price-completion", "1e6", "--max-cost", "3", "--concurrency", "1")
    with FaultyServer() as server:
        assert main(command(server, prompts, out, "--n", "5", *money)) == 2
    assert "max_cost 3 is spent, 3 samples are missing" in capsys.readouterr().err
    assert len(texts(out)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_loses_nothing_and_pays_nothing_twice(number: signal.Signals, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, [{"id": str(k), "prompt": f"p{k}"} for k in range(40)])
    out = tmp_path / "s.jsonl"
    with FaultyServer() as server:
        arguments = command(server, prompts, out, "--concurrency", "4")
        server.gate = threading.Event()
        server.gate.set()
        server.delay_s = 0.03
        process = subprocess.Popen(
            [sys.executable, "-m", "data_tools.endpoint", *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
        )  # fmt: skip
        while len(server.billed) < 8:
            time.sleep(0.005)
        server.gate.clear()
        while server.held < 4:
            time.sleep(0.005)
        before = set(server.billed)
        process.send_signal(number)
        if number != signal.SIGKILL:
            assert process.stderr is not None
            while "waiting for the answers in flight" not in process.stderr.readline():
                pass
        server.gate.set()
        printed, _ = process.communicate(timeout=60)
        while server.in_flight > 0:
            time.sleep(0.005)
        stopped_at = set(server.billed)
        assert len(stopped_at) == len(before) + 4
        if number == signal.SIGKILL:
            # The four in flight may be billed and lost, nothing else is.
            assert process.returncode == -9 and set(texts(out)) <= {(p[1:], 0) for p, _ in stopped_at}
        else:
            assert process.returncode == 1 and len(texts(out)) == len(stopped_at)
            assert f"{len(stopped_at)} of 40 samples" in printed
        server.delay_s = 0
        assert main(arguments) == 0
        assert texts(out) == {(str(k), 0): f"P{k} 1" for k in range(40)}
        twice = {key for key, count in server.billed.items() if count > 1}
        assert twice <= (stopped_at - before if number == signal.SIGKILL else set())
        assert not (tmp_path / "user_cache").joinpath("logratio/endpoint/answers.jsonl").read_bytes().count(b"\n\n")


def test_rows_are_as_documented(tmp_path: Path) -> None:
    prompts, out = write_prompts(tmp_path, [{"id": "a", "prompt": "why"}]), tmp_path / "s.jsonl"
    with FaultyServer() as server:
        assert main(command(server, prompts, out, "--logprobs")) == 0
    (line,) = out.read_bytes().splitlines(keepends=True)
    (sample,) = read_samples(out).samples
    assert line == row_of(sample)
    assert json.loads(line) == {
        "id": "a", "sample": 0, "text": "WHY 1", "finish_reason": "stop", "model": "m",
        "settings_digest": sample.settings_digest, "prompt_digest": digest_of("why"),
        "prompt_tokens": 3, "completion_tokens": 2, "logprobs": [-0.5, -1.25],
    }  # fmt: skip


def test_a_missing_file_begins_with_the_rows_of_an_earlier_turn(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, [{"id": "a", "prompt": "why"}, {"id": "b", "prompt": "how"}])
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    with FaultyServer({}) as server:
        assert main(command(server, prompts, first, "--n", "2", "--no-cache")) == 0
        assert main(command(server, prompts, second, "--n", "3", "--no-cache", "--earlier", str(first))) == 0
    assert second.read_bytes().startswith(first.read_bytes())
    assert sorted(texts(second)) == [(name, number) for name in "ab" for number in range(3)]
