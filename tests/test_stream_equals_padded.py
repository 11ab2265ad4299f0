"""A stream with shared prompts gives the log-probs and gradients of plain padded rows, for any shape of groups."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from model_fixtures import VOCABULARY, padded_token_logps, random_decoder, random_group, tiny_config
from torch import Tensor

from data_tools.encode import Group
from trainer.batch import build_stream
from trainer.models import attention
from trainer.models.decoder import Decoder

Shapes = list[tuple[int, ...]]
PATHS = pytest.mark.parametrize(
    ("whole_group", "rows"), [(10_000, 256), (0, 256), (0, 3), (14, 4)], ids=["whole", "branches", "blocks", "both"]
)
"""Settings of trainer.models.attention: a group at once, a branch at once, a few rows at once, short groups at once."""


def shapes() -> st.SearchStrategy[Shapes]:
    """Up to four groups; with an empty prompt every completion has two tokens, since its first cannot be scored."""
    with_prompt = st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=5))
    without = st.tuples(st.just(0), st.lists(st.integers(2, 7), min_size=1, max_size=3))
    group = st.one_of(with_prompt, without).map(lambda shape: (shape[0], *shape[1]))
    return st.lists(group, min_size=1, max_size=4)


def make_groups(lengths: Shapes) -> list[Group]:
    return [random_group(each, seed=index) for index, each in enumerate(lengths)]


def cut_into(blocks: tuple[int, int], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "WHOLE_GROUP", blocks[0])
    patch.setattr(attention, "ROWS", blocks[1])


def logps_and_gradients(logps: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of a random weighted mean, so that no two tokens' contributions can stand in for each other."""
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(logps.dtype)
    return logps.detach(), torch.autograd.grad((weights * logps).mean(), parameters)


def assert_stream_equals_padded(
    model: Decoder, lengths: Shapes, blocks: tuple[int, int], *, tolerance: float, score_prompt: bool = False
) -> None:
    """Log-probs within `tolerance` relative; gradients within `tolerance` of each tensor's largest magnitude.

    A tenth of `tolerance` times the largest gradient of all is allowed besides: where every token sees a single key,
    the true gradient of q_proj and k_proj is 0 and both sides hold rounding noise alone.
    """
    groups = make_groups(lengths)
    named = dict(model.named_parameters())
    with pytest.MonkeyPatch.context() as patch:
        cut_into(blocks, patch)
        logps, gradients = logps_and_gradients(
            model(build_stream(groups, score_prompt=score_prompt)), list(named.values())
        )
    padded = padded_token_logps(named, model.config, groups, score_prompt=score_prompt)
    expected_logps, expected_gradients = logps_and_gradients(padded, list(named.values()))
    torch.testing.assert_close(logps, expected_logps, rtol=tolerance, atol=0)
    floor = 0.1 * tolerance * max(gradient.abs().max().item() for gradient in expected_gradients)
    for name, gradient, expected in zip(named, gradients, expected_gradients, strict=True):
        off = (gradient - expected).abs().max().item()
        assert off <= tolerance * expected.abs().max().item() + floor, f"{name}: {off=}"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def model32(tied: bool) -> Decoder:
    return random_decoder(tiny_config(tie_word_embeddings=tied))


@pytest.fixture(scope="module")
def model64(tied: bool) -> Decoder:
    return random_decoder(tiny_config(tie_word_embeddings=tied), dtype=torch.float64)


@PATHS
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=shapes())
@example(lengths=[(1, 1)])
@example(lengths=[(1, 1, 1), (0, 2, 2), (1, 7, 1)])
@example(lengths=[(9, *[1, 2, 3] * 6)])
@example(lengths=[(0, 5), (4, 3, 3), (0, 2, 6, 3)])
def test_float32(model32: Decoder, whole_group: int, rows: int, lengths: Shapes) -> None:
    """1e-5: float32 rounds at 6e-8, and sums of some hundred terms are taken in another order."""
    assert_stream_equals_padded(model32, lengths, (whole_group, rows), tolerance=1e-5)


@PATHS
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=shapes())
@example(lengths=[(9, *[1, 2, 3] * 6)])
def test_float64(model64: Decoder, whole_group: int, rows: int, lengths: Shapes) -> None:
    """1e-10 leaves no room for anything but the order of float64 sums: the two are the same function."""
    assert_stream_equals_padded(model64, lengths, (whole_group, rows), tolerance=1e-10)


@PATHS
def test_scored_prompt(model64: Decoder, whole_group: int, rows: int) -> None:
    lengths = [(6, 3, 4), (1, 2, 2), (12, 1, 5)]
    assert_stream_equals_padded(model64, lengths, (whole_group, rows), tolerance=1e-10, score_prompt=True)


@PATHS
def test_rejected_does_not_see_chosen(
    model32: Decoder, whole_group: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: whatever the chosen completions say, what they say is multiplied by an exact 0."""
    cut_into((whole_group, rows), monkeypatch)
    groups = make_groups([(5, 6, 4), (1, 3, 3), (8, 1, 7), (0, 4, 2)])
    stream = build_stream(groups)
    for group in groups:
        group.ids[group.lengths[0] :][: group.lengths[1]] += 1
        np.mod(group.ids, VOCABULARY, out=group.ids)
    changed = build_stream(groups)
    with torch.no_grad():
        before, after = model32(stream), model32(changed)
    is_rejected = stream.score_segments % 3 == 2
    assert torch.equal(before[is_rejected], after[is_rejected])
    # chosen: a token's log-prob is that of another token now
    assert (before[~is_rejected] != after[~is_rejected]).all()
