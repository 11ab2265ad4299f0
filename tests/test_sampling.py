"""The next token from logits: cuts worked by hand, and against transformers' processors; draws follow probabilities."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from data_tools.errors import UserError
from eval import sampling
from eval.sampling import SamplingOptions, next_tokens, penalised, uniform_numbers

LOGITS = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()


def drawn(options: SamplingOptions, logits: Tensor = LOGITS, draws: int = 2000) -> list[float]:
    """The share of draws that each token gets, at equally spaced uniform numbers."""
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = next_tokens(logits.expand(draws, -1), options, uniforms)
    return (torch.bincount(tokens, minlength=len(logits)) / draws).tolist()


CUTS = [
    (SamplingOptions(), [0.5, 0.2, 0.15, 0.1, 0.05]),
    (SamplingOptions(top_k=2), [5 / 7, 2 / 7, 0, 0, 0]),
    (SamplingOptions(top_p=0.6), [5 / 7, 2 / 7, 0, 0, 0]),  # 0.5 does not reach 0.6, 0.7 does
    (SamplingOptions(top_p=0.4), [1, 0, 0, 0, 0]),
    (SamplingOptions(min_p=0.25), [0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0, 0]),  # at least 0.125
    (SamplingOptions(top_k=3, top_p=0.7), [5 / 7, 2 / 7, 0, 0, 0]),  # of the three, 0.59 and 0.82
    (SamplingOptions(temperature=0), [1, 0, 0, 0, 0]),
    (SamplingOptions(temperature=0.5), [x / 0.325 for x in (0.25, 0.04, 0.0225, 0.01, 0.0025)]),
]


@pytest.mark.parametrize(("options", "expected"), CUTS, ids=[str(case[0]) for case in CUTS])
def test_cuts_by_hand(options: SamplingOptions, expected: list[float]) -> None:
    assert drawn(options) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("first_try", [4, 256])
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=0.7, top_p=0.9),
        SamplingOptions(temperature=1.4, top_k=40),
        SamplingOptions(temperature=1.1, min_p=0.05),
        SamplingOptions(temperature=0.9, top_k=50, top_p=0.8, min_p=0.02),
        SamplingOptions(temperature=1.0, top_p=0.999),
    ],
    ids=str,
)
def test_probabilities_are_those_of_transformers(
    options: SamplingOptions, first_try: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boundaries between tokens, as the inverse of the distribution sees them, lie where transformers' do."""
    monkeypatch.setattr(sampling, "FIRST_TRY", first_try)
    logits = 3 * torch.randn(1, 400, generator=torch.Generator().manual_seed(1))
    warpers = [TemperatureLogitsWarper(options.temperature)]
    warpers += [TopKLogitsWarper(options.top_k)] if options.top_k else []
    warpers += [TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []
    warpers += [MinPLogitsWarper(options.min_p)] if options.min_p else []
    scores = logits
    for warp in warpers:
        scores = warp(torch.zeros(1, 1, dtype=torch.int64), scores)
    expected = scores.softmax(-1)[0]
    shares = torch.tensor(drawn(options, logits[0], draws=20_000))
    assert not shares[expected == 0].any()
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-4)  # two places for each end of a token's range


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    ids = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(3))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(penalised(logits, seen, 1.7), RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()))


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    for uniform in (0.0, 0.2689, 0.27, math.nextafter(1.0, 0.0)):
        (token,) = next_tokens(logits, SamplingOptions(), torch.tensor([uniform], dtype=torch.float64)).tolist()
        assert token == (1 if uniform < 0.26894 else 3)


def test_numbers_of_a_sample_are_its_own() -> None:
    first = uniform_numbers(0, "q1", 0).random(5)
    assert np.array_equal(first, uniform_numbers(0, "q1", 0).random(5))
    for other in ((1, "q1", 0), (0, "q2", 0), (0, "q1", 1), (0, "1q", 0), (0, "q\ud800", 0)):
        assert not np.array_equal(first, uniform_numbers(*other).random(5))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 1.0), ("top_k", -1), ("n", 0), ("max_tokens", 0),
     ("repetition_penalty", 0.0), ("stop", ("",))],
)  # fmt: skip
def test_bad_options_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{name} = .*: must"):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize("vocabulary", [384, 1536, 1537])
def test_the_likeliest_token_is_the_first_of_the_largest(vocabulary: int) -> None:
    """Found by parts where the vocabulary has whole ones. Few values, so that most rows have ties in several parts."""
    values = torch.randint(0, 4, (64, vocabulary), generator=torch.Generator().manual_seed(0)).float()
    tokens = next_tokens(values, SamplingOptions(temperature=0), torch.zeros(64, dtype=torch.float64))
    assert tokens.tolist() == [row.index(max(row)) for row in values.tolist()]
    assert len(set(tokens.tolist())) > 5
    last = torch.zeros(1, vocabulary)
    last[0, -1] = 1
    assert next_tokens(last, SamplingOptions(temperature=0), torch.zeros(1)).item() == vocabulary - 1
