"""Drawing completions, against transformers' generate and against the model's own log-probs of what was drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from family_fixtures import VARIANTS, VOCABULARY
from generate_fixtures import GREEDY, LENGTHS, alike_requests, by_key, requests_of
from torch import Tensor
from transformers import PreTrainedModel

from data_tools.encode import Group
from data_tools.errors import UserError
from data_tools.tokenizer import Tokenizer, load_tokenizer
from eval.generate import Request, end_tokens, generate
from eval.prefill import alike, how_many_fit, stream_tokens
from eval.sampling import SamplingOptions
from trainer.batch import build_stream
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import load_decoder
from trainer.models.packed import pack_for_sampling


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Decoder:
    return load_decoder(tiny_model_dir).requires_grad_(False)


def theirs_greedy(theirs: PreTrainedModel, request: Request, tokens: int, **options: float) -> tuple[list[int], Tensor]:
    """transformers' tokens and the logits they were chosen from."""
    ids = torch.tensor([request.prompt_ids])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences[0, ids.shape[1] :].tolist(), torch.stack(out.logits)[:, 0]


FAMILIES = (
    "llama", "mistral window", "qwen2", "qwen3", "smollm3 window", "gemma", "gemma2", "gemma3", "phi", "phi3",
    "cohere", "cohere2", "olmo2",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_transformers(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Token for token in float32; where they part, the two best logits are within 1e-4 of each other."""
    theirs = VARIANTS[name].model()
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path).requires_grad_(False)
    requests = requests_of(LENGTHS, VOCABULARY) + alike_requests(VOCABULARY)
    found = by_key(list(generate(ours, tokenizer, requests, GREEDY, slots=3)))
    near = 0
    for request in requests:
        expected, logits = theirs_greedy(theirs, request, GREEDY.max_tokens)
        own = found[request.id, 0].token_ids
        assert len(own) == GREEDY.max_tokens
        for step, (token, other) in enumerate(zip(own, expected, strict=True)):
            if token != other:
                best = logits[step].topk(2).values
                assert best[0] - best[1] < 1e-4, (request.id, step)
                near += 1
                break
    assert near <= 1


def test_repetition_penalty_equals_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    theirs = VARIANTS["llama"].model()
    theirs.save_pretrained(tmp_path)
    ours, requests = load_decoder(tmp_path).requires_grad_(False), requests_of(LENGTHS, VOCABULARY)
    options = SamplingOptions(max_tokens=24, temperature=0, repetition_penalty=1.3)
    found = by_key(list(generate(ours, tokenizer, requests, options, slots=4)))
    plain = by_key(list(generate(ours, tokenizer, requests, GREEDY, slots=4)))
    for request in requests:
        expected, _ = theirs_greedy(theirs, request, 24, repetition_penalty=1.3)
        assert found[request.id, 0].token_ids == expected
    assert any(found[key].token_ids != plain[key].token_ids for key in found)


def scored(model: Decoder, request: Request, ids: list[int]) -> Tensor:
    """(len(ids),) log-probs of a completion by the training path."""
    prompt = len(request.prompt_ids)
    group = Group(
        "g", np.array([*request.prompt_ids, *ids], dtype=np.int32), (prompt, len(ids)), ((), ((0, len(ids)),))
    )
    with torch.no_grad():
        return model(build_stream([group]))


def test_log_probs_are_those_of_training(model: Decoder, tokenizer: Tokenizer) -> None:
    """Before temperature, cuts and penalty."""
    requests = requests_of((4, 9, 2), model.config.vocab_size)
    options = SamplingOptions(max_tokens=15, temperature=0.7, top_p=0.8, repetition_penalty=1.2, n=3)
    for each in generate(model, tokenizer, requests, options, slots=4):
        request = next(request for request in requests if request.id == each.request_id)
        expected = scored(model, request, each.token_ids)
        torch.testing.assert_close(torch.tensor(each.logps), expected, rtol=0, atol=2e-5)


def test_a_sample_depends_on_seed_prompt_and_number_only(model: Decoder, tokenizer: Tokenizer) -> None:
    """Alone or among others, whatever slots there are and in which order; other numbers, seeds and ids differ."""
    requests = requests_of((4, 9, 2, 12, 7), model.config.vocab_size)
    options = SamplingOptions(max_tokens=20, temperature=1.0, n=4, seed=3)
    together = by_key(list(generate(model, tokenizer, requests, options, slots=6)))
    assert len(together) == 20
    backwards = by_key(list(generate(model, tokenizer, requests[::-1], options, slots=2, prefill_tokens=10)))
    alone = by_key(list(generate(model, tokenizer, requests[3:4], options, slots=1)))
    one_of_them = by_key(list(generate(model, tokenizer, requests[3:4], options, samples=[[2]])))
    for other in (backwards, alone, one_of_them):
        assert all(together[key].token_ids == value.token_ids for key, value in other.items())
    assert set(one_of_them) == {("p3", 2)}
    assert len({tuple(each.token_ids) for each in together.values()}) == 20
    changed = SamplingOptions(max_tokens=20, temperature=1.0, n=4, seed=4)
    other_seed = by_key(list(generate(model, tokenizer, requests, changed, slots=6)))
    renamed = [Request(f"other {request.id}", request.prompt_ids) for request in requests]
    other_ids = by_key(list(generate(model, tokenizer, renamed, options, slots=6)))
    assert all(together[key].token_ids != other_seed[key].token_ids for key in together)
    assert all(together[key].token_ids != other_ids[f"other {key[0]}", key[1]].token_ids for key in together)


def test_slots_are_refilled_beside_longer_ones(model: Decoder, tokenizer: Tokenizer) -> None:
    """Ends at many tokens, so that short prompts begin while a slot still holds a long one."""
    requests = requests_of((90, 1, 2, 40, 1, 1, 3, 1, 2, 1, 5, 1), model.config.vocab_size)
    options = SamplingOptions(max_tokens=60, temperature=1.0, n=3)
    ends = range(0, model.config.vocab_size, 25)
    together = by_key(list(generate(model, tokenizer, requests, options, stop_ids=ends, slots=3)))
    assert len({len(each.token_ids) for each in together.values()}) > 10
    for request in requests:
        alone = by_key(list(generate(model, tokenizer, [request], options, stop_ids=ends, slots=1)))
        assert all(together[key].token_ids == value.token_ids for key, value in alone.items())


def test_a_prompt_is_computed_once_for_all_its_samples(model: Decoder, tokenizer: Tokenizer) -> None:
    """And what prompts begin with in common once for them all."""
    options = SamplingOptions(max_tokens=3, n=5)
    for requests, prefill_tokens, expected, slots in (
        (requests_of((23, 19), 60), 2048, [42], 4),
        (requests_of((23, 19), 60), 41, [19, 23], 4),
        (alike_requests(60), 2048, [19 + 10 + 2 + 5 + 1], 4),
        (alike_requests(60), 2048, [30, 19 + 5 + 1], 2),
        (alike_requests(60), 20 + 9 + 1, [30, 19 + 5 + 1], 4),
    ):
        lengths: list[int] = []
        hook = model.register_forward_pre_hook(lambda _, given, own=lengths: own.append(len(given[0].tokens)))
        try:
            drawn = generate(model, tokenizer, requests, options, slots=slots, prefill_tokens=prefill_tokens)
            done = list(drawn)
        finally:
            hook.remove()
        assert len(done) == 5 * len(requests)
        assert sorted(length for length in lengths if length > 4) == sorted(expected)  # others are steps of 4 tokens


def test_prompts_are_run_alone_where_frequencies_depend_on_the_length(tmp_path: Path, tokenizer: Tokenizer) -> None:
    VARIANTS["llama dynamic rope"].model().save_pretrained(tmp_path)
    dynamic, lengths = load_decoder(tmp_path), []
    dynamic.register_forward_pre_hook(lambda _, given: lengths.append(len(given[0].tokens)))
    options = SamplingOptions(max_tokens=3, temperature=0)
    assert len(list(generate(dynamic, tokenizer, alike_requests(VOCABULARY), options, slots=4, prefill_tokens=60))) == 4
    assert [length for length in lengths if length > 4] == [29 + 21, 24 + 20]


def test_prompts_join_while_that_saves_tokens() -> None:
    system, examples = tuple(range(100, 120)), tuple(range(200, 300))
    few_shot = [system + examples + (index,) for index in range(3)]
    plain = [(*system, 7, 8, index) for index in range(4)]
    both = alike(few_shot + plain[:1])
    assert both == [(120, few_shot), (0, plain[:1])]  # 3 * 20 saved are less than 2 * 120
    assert alike(plain) == [(22, plain)]
    assert alike([system, system]) == [(19, [system, system])]  # each has a token of its own
    assert alike([system[:15], system[:15]]) == [(0, [system[:15]]), (0, [system[:15]])]
    assert stream_tokens(both) == 120 + 3 + 23
    for most, expected in ((1, 1), (121, 1), (122, 2), (123, 3), (145, 3), (146, 4), (149, 4)):
        assert how_many_fit(few_shot + plain[:1], most) == expected
    assert alike([]) == [] and how_many_fit([], 9) == 0
    assert alike(plain, share=False) == [(0, [prompt]) for prompt in plain]
    assert how_many_fit(plain, 60, share=False) == 2 and how_many_fit(plain, 60) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_block_as_one_function_gives_the_same(tiny_model_dir: Path, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    model = load_decoder(tiny_model_dir, dtype=dtype).requires_grad_(False)
    pack_for_sampling(model)
    requests = requests_of(LENGTHS, model.config.vocab_size)
    calls = []
    for block in model.layers:
        assert block.one_token is not None
        block.one_token = lambda *given, own=block.one_token: calls.append(1) or own(*given)
    as_one = by_key(list(generate(model, tokenizer, requests, GREEDY, slots=3)))
    assert len(calls) >= len(model.layers) * (GREEDY.max_tokens - 1)
    for block in model.layers:
        block.one_token = None
    by_modules = by_key(list(generate(model, tokenizer, requests, GREEDY, slots=3)))
    assert {key: each.token_ids for key, each in as_one.items()} == {
        key: each.token_ids for key, each in by_modules.items()
    }
    for key, each in as_one.items():
        assert each.logps == pytest.approx(by_modules[key].logps, abs=1e-5 if dtype == torch.float32 else 2**-6)


def test_stops_at_tokens_and_texts(model: Decoder, tokenizer: Tokenizer) -> None:
    (request,) = requests_of((6,), model.config.vocab_size)
    (plain,) = generate(model, tokenizer, [request], GREEDY)
    assert plain.finish_reason == "length" and len(plain.token_ids) == 24 and plain.prompt_tokens == 6
    end = plain.token_ids[7]
    first = plain.token_ids.index(end)
    for given in ({"stop_ids": (end,)}, {}):
        own = GREEDY if given else SamplingOptions(max_tokens=24, temperature=0, stop_ids=(end,))
        (stopped,) = generate(model, tokenizer, [request], own, **given)
        assert stopped.finish_reason == "stop"
        assert stopped.token_ids == plain.token_ids[: first + 1]
        assert stopped.text == tokenizer.decode(plain.token_ids[:first])
    middle = plain.text[5:8]
    own = SamplingOptions(max_tokens=24, temperature=0, stop=("no such text", middle))
    (stopped,) = generate(model, tokenizer, [request], own)
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text[: plain.text.index(middle)]
    assert plain.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    assert middle in tokenizer.decode(stopped.token_ids)


def test_of_two_stop_texts_the_earlier_place_counts(model: Decoder, tokenizer: Tokenizer) -> None:
    """One token brings both: its whole text, and the text without its first letter."""
    (request,) = requests_of((6,), model.config.vocab_size)
    (plain,) = generate(model, tokenizer, [request], SamplingOptions(max_tokens=60, temperature=1.0))
    texts = [tokenizer.decode([token]) for token in plain.token_ids]
    whole = next(text for text in texts if len(text) > 2 and plain.text.find(text) == plain.text.find(text[1:]) - 1)
    own = SamplingOptions(max_tokens=60, temperature=1.0, stop=(whole[1:], whole))
    (stopped,) = generate(model, tokenizer, [request], own)
    assert (stopped.text, stopped.finish_reason) == (plain.text[: plain.text.index(whole)], "stop")


def test_slots_are_refilled_and_fewer_at_the_end(model: Decoder, tokenizer: Tokenizer) -> None:
    """Samples end at different times (at a common token); at no time are more than 4 under way, at the end fewer."""
    requests = requests_of((5,) * 12, model.config.vocab_size)
    steps: list[int] = []
    options = SamplingOptions(max_tokens=40, temperature=1.5, seed=1)
    ends = tuple(range(3, model.config.vocab_size, 9))
    hook = model.register_forward_pre_hook(lambda module, given: steps.append(len(given[0].tokens)))
    try:
        done = by_key(list(generate(model, tokenizer, requests, options, stop_ids=ends, slots=4, prefill_tokens=5)))
    finally:
        hook.remove()
    steps = [length for length in steps if length != 5]  # prompts are of 5 tokens, and run one by one
    assert len(done) == 12 and max(steps) == 4 and steps[-1] < 4
    assert len({len(each.token_ids) for each in done.values()}) > 3
    slow = by_key(list(generate(model, tokenizer, requests, options, stop_ids=ends, slots=1)))
    assert all(slow[key].token_ids == each.token_ids for key, each in done.items())


def test_long_outputs(tokenizer: Tokenizer, tiny_model_dir: Path) -> None:
    """Past 1,000 tokens, over a cache that grows; log-probs are still those of the training path."""
    model = load_decoder(tiny_model_dir).requires_grad_(False)
    requests = requests_of((5, 40), model.config.vocab_size)
    options = SamplingOptions(max_tokens=1100, temperature=1.0)
    for each in generate(model, tokenizer, requests, options):
        assert len(each.token_ids) == 1100
        request = next(request for request in requests if request.id == each.request_id)
        torch.testing.assert_close(torch.tensor(each.logps), scored(model, request, each.token_ids), rtol=0, atol=1e-4)


@pytest.mark.long
def test_past_ten_thousand_tokens(tokenizer: Tokenizer, model: Decoder) -> None:
    (request,) = requests_of((5,), model.config.vocab_size)
    (done,) = generate(model, tokenizer, [request], SamplingOptions(max_tokens=10_500, temperature=1.0))
    assert len(done.token_ids) == 10_500
    expected = scored(model, request, done.token_ids)
    assert (torch.tensor(done.logps) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["llama biases, tied", "gemma2", "phi", "phi3", "cohere qk norm"])
def test_packed_bfloat16_models_give_the_logits_of_plain_ones(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    VARIANTS[name].model().save_pretrained(tmp_path)
    request = requests_of((9,), VOCABULARY)[0]
    truth = load_decoder(tmp_path).requires_grad_(False)
    plain, packed = (load_decoder(tmp_path, dtype=torch.bfloat16).requires_grad_(False) for _ in range(2))
    pack_for_sampling(packed)
    options = SamplingOptions(max_tokens=12, temperature=1.0)
    (done,) = generate(packed, tokenizer, [request], options)
    exact, rounded = scored(truth, request, done.token_ids), scored(plain, request, done.token_ids)
    error, baseline = ((x - exact).abs().mean().item() for x in (torch.tensor(done.logps), rounded))
    assert error <= 2 * baseline + 2**-8, f"{error=} {baseline=}"


def test_joined_products_change_nothing_in_float32(tiny_model_dir: Path, tokenizer: Tokenizer) -> None:
    plain, joined = (load_decoder(tiny_model_dir).requires_grad_(False) for _ in range(2))
    pack_for_sampling(joined)
    assert joined.layers[0].self_attn.fused and joined.layers[0].mlp.fused
    requests = requests_of((4, 9), plain.config.vocab_size)
    found = [by_key(list(generate(each, tokenizer, requests, GREEDY))) for each in (plain, joined)]
    for key, each in found[0].items():
        assert found[1][key].token_ids == each.token_ids
        assert found[1][key].logps == pytest.approx(each.logps, abs=1e-5)


def test_longrope_prompts_of_both_frequencies_side_by_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    VARIANTS["phi3 longrope"].model().save_pretrained(tmp_path)
    longrope, requests = load_decoder(tmp_path).requires_grad_(False), requests_of((3, 70, 17, 66, 1), VOCABULARY)
    for each in generate(longrope, tokenizer, requests, SamplingOptions(max_tokens=12, n=2), slots=4):
        expected = scored(longrope, next(own for own in requests if own.id == each.request_id), each.token_ids)
        torch.testing.assert_close(torch.tensor(each.logps), expected, rtol=0, atol=2e-5)


def test_end_tokens_come_from_all_that_name_them(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    assert eos is not None
    assert end_tokens(tokenizer, {"eos_token_id": 7}, {"eos_token_id": [7, 9]}) == (eos, 7, 9)
    assert end_tokens(tokenizer, {}, {"eos_token_id": None}) == (eos,)


def test_what_cannot_be_drawn_is_refused(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt 'empty': has no tokens"):
        list(generate(model, tokenizer, [Request("empty", ())], GREEDY))
    VARIANTS["llama dynamic rope"].model().save_pretrained(tmp_path)
    dynamic = load_decoder(tmp_path)
    assert len(list(generate(dynamic, tokenizer, requests_of((40,), VOCABULARY), GREEDY))) == 1
    with pytest.raises(UserError, match="prompt 'p0': 41 tokens and max_tokens 24 pass 64, where the model's dynamic"):
        list(generate(dynamic, tokenizer, requests_of((41,), VOCABULARY), GREEDY))
