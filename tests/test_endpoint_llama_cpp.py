"""The client against llama.cpp's own server with SmolLM2-135M-Instruct, where LOGRATIO_LLAMA_CPP names a Python
that has the package `xllamacpp` (pip install xllamacpp, in an environment of its own)."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from endpoint_server import closed_port
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_tools.endpoint import main
from data_tools.endpoint_cache import AnswerCache
from data_tools.endpoint_client import Endpoint
from data_tools.endpoint_config import EndpointConfig
from data_tools.endpoint_http import EndpointError
from data_tools.endpoint_limits import RetryPolicy
from data_tools.endpoint_request import Question, Sampling
from data_tools.samples import read_samples

pytestmark = pytest.mark.long
RUNNER = Path(__file__).with_name("endpoint_llama_cpp.py")
QUESTIONS = ["What is the capital of France?", "Name a colour.", "What is 2 + 3?", "Say hello.", "What do cats eat?"]


@contextlib.contextmanager
def serving(gguf: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    python = os.environ.get("LOGRATIO_LLAMA_CPP")
    if not python:
        pytest.skip("LOGRATIO_LLAMA_CPP names no Python that has xllamacpp")
    process = subprocess.Popen(
        [python, str(RUNNER), str(gguf), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip().endswith(f":{port}"), "the server did not start"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def gguf(smollm2_dir: Path) -> Path:
    return smollm2_dir.parent / f"{smollm2_dir.name}.Q4_1.gguf"


def test_greedy_answers_and_their_log_probs_are_the_models(
    gguf: Path, smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts, out, port = tmp_path / "p.jsonl", tmp_path / "s.jsonl", closed_port()
    rows = [{"id": str(k), "prompt": q} for k, q in enumerate(QUESTIONS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with serving(gguf, port):
        fixed = ["--url", f"http://127.0.0.1:{port}/v1", "--model", "smollm2", "--prompts", str(prompts)]
        fixed += ["--temperature", "0", "--max-tokens", "8", "--logprobs", "--cache", str(tmp_path / "cache.jsonl")]
        assert main([*fixed, "--out", str(out), "--n", "2", "--concurrency", "2"]) == 0
        assert "10 asked for" in capsys.readouterr().out
        assert main([*fixed, "--out", str(tmp_path / "again.jsonl"), "--n", "2"]) == 0
        assert "10 from the cache, 0 asked for; 0 prompt and 0 completion tokens" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    samples = {sample.key: sample for sample in read_samples(out).samples}
    for k, question in enumerate(QUESTIONS):
        sample = samples[str(k), 0]
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert sample.prompt_tokens == ids["input_ids"].shape[1] and sample.completion_tokens is not None
        assert 1 <= sample.completion_tokens <= 8 and sample.logprobs is not None
        assert sample.completion_tokens == 8 or sample.finish_reason == "stop"
        with torch.inference_mode():
            logps = model(**ids).logits[0, -1].log_softmax(-1)
        # The weights are the same numbers; llama.cpp rounds activations to 8 bits for its matrix products.
        assert abs(sample.logprobs[0] - logps.max().item()) < 0.25, (question, sample)
        assert (
            sample.text.startswith(tokenizer.decode(logps.argmax()).strip()) or logps.topk(2).values.diff().abs() < 0.5
        )


def test_a_server_that_is_killed_and_comes_back_costs_nothing_but_time(gguf: Path, tmp_path: Path) -> None:
    port = closed_port()
    config = EndpointConfig(
        base_url=f"http://127.0.0.1:{port}/v1",
        model="smollm2",
        concurrency=2,
        retry=RetryPolicy(retries=100, first_s=0.1, longest_s=0.5),
    )
    sampling = Sampling(temperature=1.0, max_tokens=24, seed=7, n=4)
    questions = [Question(id=q, prompt=q, sampling=sampling, samples=tuple(range(4))) for q in QUESTIONS]
    with contextlib.closing(AnswerCache(tmp_path / "cache.jsonl")) as cache:
        endpoint = Endpoint(config, cache)
        results = endpoint.results(questions)
        with serving(gguf, port) as first:
            found = [next(results) for _ in range(3)]
            first.kill()
            first.wait()
            with serving(gguf, port):
                found += results
        assert all(result.answer is not None for result in found) and len(cache) == len(found) == 20
        assert endpoint.totals.retries >= 1 and endpoint.totals.requests == 20
        # Sample k has a seed of its own: samples of a prompt differ.
        texts = {(r.question.id, r.answer.text) for r in found if r.answer is not None}
        assert len(texts) >= 15


def test_errors_of_a_real_server_say_what_to_do(gguf: Path) -> None:
    port = closed_port()
    with serving(gguf, port):
        question = Question(id="a", prompt="hi", sampling=Sampling(max_tokens=2))
        wrong = EndpointConfig(base_url=f"http://127.0.0.1:{port}/nothing", model="m")
        with pytest.raises(EndpointError, match=r"answered 404 .*does the base URL end as it should \(often /v1\)"):
            list(Endpoint(wrong).results([question]))
        right = EndpointConfig(base_url=f"http://127.0.0.1:{port}/v1", model="m")
        long = Question(id="long", prompt="word " * 3000, sampling=Sampling(max_tokens=2))
        by_id = {result.question.id: result for result in Endpoint(right).results([long, question])}
        assert by_id["a"].answer is not None and "answered 400" in str(by_id["long"].error)
