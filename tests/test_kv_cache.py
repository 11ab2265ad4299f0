"""Keys and values in slots: how much room there is, and what is kept of what was there."""

from pathlib import Path

import pytest
import torch
from generate_fixtures import GREEDY, LENGTHS, by_key, requests_of

from data_tools.tokenizer import Tokenizer, load_tokenizer
from eval.generate import generate
from eval.sampling import SamplingOptions
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import load_decoder
from trainer.models.kv_cache import PromptCache, SlotCache


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Decoder:
    return load_decoder(tiny_model_dir).requires_grad_(False)


def test_growing_the_cache_frees_each_old_buffer_in_turn(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlotCache(model.config, 2, dtype=torch.float32, device=torch.device("cpu"))
    cache.begin()
    buffer, views = cache._buffer, []
    monkeypatch.setattr(cache, "_buffer", lambda capacity: views.append(len(cache.views)) or buffer(capacity))
    assert len(cache.views) == len(model.layers)
    cache.make_room(500)
    assert views == [0] * len(model.layers)


def test_the_cache_has_room_for_what_may_come_and_no_more(model: Decoder) -> None:
    def room(needed: int, **most: int) -> int:
        cache = SlotCache(model.config, 2, dtype=torch.float32, device=torch.device("cpu"), **most)
        cache.make_room(needed)
        return cache.capacity

    assert (room(128), room(128, most_tokens=130), room(128, most_tokens=128)) == (160, 160, 128)
    assert room(129, most_tokens=128) == 160  # what is needed counts


def test_room_that_is_far_too_much_is_given_back_between_steps(model: Decoder) -> None:
    cache = SlotCache(model.config, 2, dtype=torch.float32, device=torch.device("cpu"))
    cache.make_room(300)
    cache.begin()
    assert cache.capacity == 32
    cache.lengths[1] = 31
    cache.make_room(80)
    cache.begin()
    assert cache.capacity == 96 == 2 * 32 + 32  # not far too much


def test_what_hidden_places_hold_does_not_matter(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(LENGTHS, model.config.vocab_size)
    plain = by_key(list(generate(model, tokenizer, requests, GREEDY, slots=3)))
    buffer = SlotCache._buffer
    monkeypatch.setattr(SlotCache, "_buffer", lambda *given: buffer(*given).fill_(float("nan")))
    assert by_key(list(generate(model, tokenizer, requests, GREEDY, slots=3))) == plain


def test_room_is_made_once_for_prompts_of_any_lengths(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, made = requests_of((20, 300, 20, 20), model.config.vocab_size), []
    rebuild = SlotCache._rebuild
    monkeypatch.setattr(
        SlotCache, "_rebuild", lambda self, room, slots: made.append(room) or rebuild(self, room, slots)
    )
    list(generate(model, tokenizer, requests, SamplingOptions(max_tokens=4, temperature=0), slots=4))
    assert made[0] == 320 and made.count(320) == 1


def test_a_prompts_keys_and_values_are_kept_without_the_product_they_are_a_part_of() -> None:
    product, cache = torch.zeros(6, 5, 4), PromptCache()
    cache.attend(lambda q, k, v: v)(product[:, :3], product[:, 3:4], product[:, 4:])
    assert [kept.untyped_storage().nbytes() for kept in cache.layers[0]] == [6 * 4 * 4] * 2
