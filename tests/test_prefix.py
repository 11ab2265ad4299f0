"""A prompt whose answer has begun: the prefix goes on in tokens, is in the digest and is judged with the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import FaultyServer
from text_fixtures import SENTENCES, spaced_folder

from data_tools import endpoint, verify
from data_tools.chat_template import load_chat_template
from data_tools.encode import EncodeOptions, encode_prefixes, encode_prompts, encode_records
from data_tools.errors import DataErrors
from data_tools.jsonl import write_rows
from data_tools.pairs.exchange import read_answers
from data_tools.samples import Sample, digest_of, prompt_digest, read_prompts, read_samples
from data_tools.schema import Message, Record
from data_tools.steps import split_steps
from data_tools.tokenizer import load_tokenizer
from eval import sample
from eval.generate import Request, generate
from eval.sampling import SamplingOptions
from trainer.entry import exit_code
from trainer.models.hf_weights import load_decoder

ANSWER = "First 2 + 3 = 5.\nThen 5 * 4 = 20.\nThe answer is <|im_end|> 20"


def rows(path: Path, *values: dict[str, Any]) -> Path:
    write_rows(path, values)
    return path


def draw(model: Path, prompts: Path, out: Path, *more: str) -> dict[tuple[str, int], Sample]:
    common = ["--model", str(model), "--prompts", str(prompts), "--out", str(out), "--dtype", "float32"]
    assert exit_code(sample.main, [*common, *more]) == 0
    return {own.key: own for own in read_samples(out).samples}


@pytest.mark.parametrize("cut", ["", "First 2 + 3 = 5.\n", ANSWER])
@pytest.mark.parametrize("spoken", [True, False])
def test_prompt_and_prefix_are_the_tokens_that_training_begins_with(
    cut: str, spoken: bool, tiny_model_dir: Path
) -> None:
    tokenizer, template = load_tokenizer(tiny_model_dir), load_chat_template(tiny_model_dir)
    turns = ((Message("user", "why?"),), (Message("assistant", ANSWER),))
    prompt, answer = turns if spoken else ("why?", ANSWER)
    row = Record(id="r", prompt=prompt, completions=(answer,), path="f", line=1)
    (group,), _ = encode_records([row], tokenizer, template, EncodeOptions(kind="sft", max_length=None))
    ids = encode_prompts([row], tokenizer, template)
    (prefix,) = encode_prefixes([cut], ids, tokenizer)
    assert [*ids[0], *prefix] == group.ids[: len(ids[0]) + len(prefix)].tolist()
    assert tokenizer.decode(prefix) == cut
    control = encode_prefixes(["a <|im_end|>"], ids, tokenizer, special_tokens="control")[0]
    assert control[-1] == tokenizer.eos_id or tokenizer.is_special(control[-1])
    assert not tokenizer.is_special(encode_prefixes(["a <|im_end|>"], ids, tokenizer)[0][-1])


def test_digests_and_rows(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "why?"}
    path = rows(tmp_path / "p.jsonl", {"id": "a", "prompt": "why?"}, {"id": "b", "prompt": [turn], "prefix": "As "})
    plain, begun = read_prompts(path)
    assert (plain.prefix, begun.prefix) == ("", "As ")
    assert plain.digest == digest_of("why?") == prompt_digest("why?")
    assert begun.digest == digest_of({"prompt": [turn], "prefix": "As "}) != digest_of([turn])
    with pytest.raises(DataErrors, match="field 'prefix': expected a string"):
        read_prompts(rows(path, {"prompt": "x", "prefix": None}))


def test_a_greedy_answer_goes_on_as_it_did(smollm2_dir: Path, tmp_path: Path) -> None:
    """Cut at a space inside and behind a line: the rest comes back, and prefix and rest are the answer. In float32,
    where the gap between two tokens is far above the rounding of other shapes."""
    prompts = rows(tmp_path / "p.jsonl", {"id": "q", "prompt": "List three fruits."})
    options = ("--temperature", "0", "--max-tokens", "30")
    whole = draw(smollm2_dir, prompts, tmp_path / "s.jsonl", *options)["q", 0]
    tokenizer = load_tokenizer(smollm2_dir)
    line = len(split_steps(whole.text, "line").steps[0])
    word = whole.text.index(" ", line)
    more = []
    for name, place in (("line", line), ("word", word)):
        used = len(tokenizer.encode_batch([whole.text[:place]], [0])[0])
        settings = {"max_tokens": whole.completion_tokens - used}
        prompt = "List three fruits."
        more.append({"id": f"q#{name}", "prompt": prompt, "prefix": whole.text[:place], "settings": settings})
    begun = rows(tmp_path / "b.jsonl", *more)
    found = draw(smollm2_dir, begun, tmp_path / "b_s.jsonl", *options)
    for own in more:
        rest = found[own["id"], 0]
        assert own["prefix"] + rest.text == whole.text
        assert rest.prompt_tokens + rest.completion_tokens == whole.prompt_tokens + whole.completion_tokens
        assert rest.prompt_digest != whole.prompt_digest
    answers = read_answers(begun, tmp_path / "b_s.jsonl")
    assert [answer.prefix for answer in answers] == [own["prefix"] for own in more]


def test_a_space_between_prefix_and_rest_is_kept(tmp_path: Path, tiny_model_dir: Path) -> None:
    """This kind of tokenizer drops a text's first space; the rest of an answer is no text of its own."""
    tokenizer = load_tokenizer(spaced_folder(tmp_path, rule="first"))
    model = load_decoder(tiny_model_dir).requires_grad_(False)
    words = " ".join(SENTENCES).split()
    requests = [
        Request(word, tuple(ids), len(ids)) for word, ids in zip(words, tokenizer.encode_batch(words), strict=True)
    ]
    begun = {request.id: list(request.prompt_ids) for request in requests}
    options = SamplingOptions(max_tokens=3, temperature=0)
    spaces = 0
    for done in generate(model, tokenizer, requests, options):
        plain = [token for token in done.token_ids if token < 200 and not tokenizer.is_special(token)]
        assert tokenizer.decode(begun[done.request_id]) + done.text == tokenizer.decode(begun[done.request_id] + plain)
        spaces += done.text.startswith(" ")
    assert spaces > 0


def test_servers_are_asked_to_go_on_or_the_row_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = rows(tmp_path / "p.jsonl", {"id": "a", "prompt": "why"}, {"id": "b", "prompt": "why", "prefix": "as "})
    with FaultyServer() as server:
        command = ["--url", server.url, "--model", "m", "--prompts", str(prompts), "--concurrency", "1"]
        assert endpoint.main([*command, "--out", str(tmp_path / "no.jsonl")]) == 2
        assert f"{prompts}:2: field 'prefix': most servers begin a new answer" in capsys.readouterr().err
        assert server.requests == []
        chat = tmp_path / "chat.jsonl"
        for _ in range(2):
            assert endpoint.main([*command, "--out", str(chat), "--continue-final-message"]) == 0
        assert endpoint.main([*command, "--out", str(tmp_path / "text.jsonl"), "--api", "completions"]) == 0
    user, begun = {"role": "user", "content": "why"}, {"role": "assistant", "content": "as "}
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    assert server.requests == [
        {"model": "m", "messages": [user]},
        {"model": "m", "messages": [user, begun], **goes_on},
        {"model": "m", "prompt": "why"},
        {"model": "m", "prompt": "whyas "},
    ]
    assert [own.text for own in read_samples(chat).samples] == ["WHY None", "AS  None"]
    assert len(read_answers(prompts, chat)) == 2


def test_the_whole_answer_is_judged(tmp_path: Path) -> None:
    code = "def double(x):\n"
    prompts = rows(
        tmp_path / "p.jsonl",
        {"id": "c#0#0", "prompt": "Double.", "prefix": code},
        {"id": "c#0#1", "prompt": "Double."},
    )
    samples = rows(
        tmp_path / "s.jsonl",
        {"id": "c#0#0", "sample": 0, "text": "    return 2 * x\n"},
        {"id": "c#0#1", "sample": 0, "text": "    return 2 * x\n"},
    )
    tasks = rows(tmp_path / "t.jsonl", {"id": "c", "prompt": "Double.", "tests": "assert double(2) == 4"})
    out = tmp_path / "v.jsonl"
    command = ["--kind", "code", "--samples", str(samples), "--tasks", str(tasks), "--out", str(out)]
    assert verify.main([*command, "--prompts", str(prompts)]) == 0
    found = [json.loads(line)["verdict"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert found[0] == "correct" and found[1] != "correct"
