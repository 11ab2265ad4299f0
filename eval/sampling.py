"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, in the order of transformers.

Pure functions of logits and one uniform number a row. Nothing here knows a model or a sequence.
Letters: S rows, V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import UserError
from kernels.argmax import argmax_of_rows

FIRST_TRY = 256
"""Nucleus sampling looks at so many of the largest probabilities first: a whole sort of a vocabulary takes long."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How completions are drawn. `temperature` 0: always the likeliest token. Raises UserError for bad values."""

    max_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that were there, multiplies negative ones (Keskar et al. 2019)."""
    stop: tuple[str, ...] = ()
    """Texts at which a completion ends; they are not part of it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens at which a completion ends, beside those of the model."""
    n: int = 1
    """Samples a prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, words in (
            ("max_tokens", self.max_tokens >= 1, "must be 1 or more"),
            ("temperature", self.temperature >= 0, "must be 0 or more"),
            ("top_k", self.top_k >= 0, "must be 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "must be at least 0 and below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "must be above 0"),
            ("n", self.n >= 1, "must be 1 or more"),
            ("stop", all(self.stop), "must not be empty text"),
        ):
            if not fits:
                raise UserError(f"{name} = {getattr(self, name)!r}: {words}")


def uniform_numbers(seed: int, prompt_id: str, sample: int) -> np.random.Generator:
    """The random numbers of one sample: a function of these three alone, whatever else is drawn beside it."""
    digest = hashlib.sha256(f"{seed}\0{sample}\0{prompt_id}".encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """(S, V) logits with the penalty where `seen` (S, V) bool says that the token was there."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def next_tokens(logits: Tensor, options: SamplingOptions, uniforms: Tensor) -> Tensor:
    """(S,) int64 tokens: the likeliest at temperature 0, else drawn by inverting the distribution at `uniforms`.

    logits (S, V) float32, penalised already. uniforms (S,) float64 in [0, 1). Of equal logits the first counts.
    """
    if options.temperature == 0:
        return argmax_of_rows(logits)
    scaled = logits / options.temperature
    if not options.top_k and options.top_p == 1 and not options.min_p:
        return _invert(scaled.softmax(-1, dtype=torch.float64), uniforms)
    probabilities, order = _candidates(scaled, options)
    if options.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # of likelier tokens
        probabilities = probabilities.masked_fill(before >= options.top_p, 0.0)
    if options.min_p:
        least = options.min_p * probabilities[:, :1]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return order.gather(1, _invert(probabilities, uniforms)[:, None]).squeeze(1)


def _candidates(scaled: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Probabilities in descending order, float64, and their tokens: of the top k, or of all that may be drawn."""
    vocabulary, wide = scaled.shape[1], scaled.double()
    if options.top_k:
        largest, order = wide.topk(min(options.top_k, vocabulary), dim=-1)
        return largest.softmax(-1), order
    total = wide.logsumexp(-1, keepdim=True)
    if vocabulary > FIRST_TRY:
        largest, order = wide.topk(FIRST_TRY, dim=-1)
        probabilities = (largest - total).exp()
        enough = probabilities.sum(-1) >= options.top_p
        if options.min_p:
            enough |= probabilities[:, -1] < options.min_p * probabilities[:, 0]
        if bool(enough.all()):
            return probabilities, order
    largest, order = wide.sort(dim=-1, descending=True, stable=True)
    return (largest - total).exp(), order


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """(S,) places where the cumulated probabilities (S, n) pass `uniforms` of their sum; never one of probability 0."""
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    wanted = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, wanted, right=True).squeeze(1)
