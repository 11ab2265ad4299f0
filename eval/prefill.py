"""Run prompts through a model, all tokens at once: their keys and values, and the logits behind each.

Prompts that begin alike (a system message, worked examples) are one group of the stream, as a preference pair is: what
they share is computed once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_tools.encode import Group
from trainer.batch import Stream, build_stream
from trainer.models.decoder import Decoder
from trainer.models.kv_cache import PromptCache

LEAST_SHARED = 16
"""Fewer tokens in common are not worth a group."""

Tokens = tuple[int, ...]
Run = tuple[int, list[Tokens]]
"""How many tokens its prompts begin with in common (0: it is one prompt), and the prompts."""


@dataclass(frozen=True)
class Prefilled:
    """A prompt of P tokens that was run."""

    cache: PromptCache
    """Keys and values of the whole stream, which what the prompts share is in once."""
    places: Tensor
    """(P,) the prompt's tokens in it."""
    logits: Tensor
    """(V,) float32 on the CPU, of the token behind it."""
    beyond: bool
    """Longer than what the model was first trained on, where that matters (trainer.models.rope)."""


def prefill(model: Decoder, prompts: Sequence[Tokens]) -> list[Prefilled]:
    """Each prompt, run beside the others in one stream; each has one token or more."""
    ropes = {layer.rope for layer in model.config.layers if layer.rope is not None}
    runs = alike(prompts, share=shares(model))
    stream, cache = build_stream([_group(shared, own) for shared, own in runs]), PromptCache()
    places = []
    for group in stream.layout:
        prefix = torch.arange(group.start, group.start + group.lengths[0])
        if len(group.lengths) == 1:
            places.append(prefix)
        start = group.start + group.lengths[0]
        for length in group.lengths[1:]:
            places.append(torch.cat((prefix, torch.arange(start, start + length))))
            start += length
    lasts = torch.stack([own[-1] for own in places])
    stream = Stream(**{**vars(stream), "score_index": lasts}).to(model.head_weight.device)
    logits = model(stream, output="next", cache=cache).float().cpu()
    return [
        Prefilled(cache, own, row, any(rope.is_beyond((len(own),)) for rope in ropes))
        for own, row in zip(places, logits, strict=True)
    ]


def shares(model: Decoder) -> bool:
    """Is a prompt's beginning the same in a longer one? Not where frequencies depend on the length."""
    return not any(layer.rope is not None and layer.rope.by_length for layer in model.config.layers)


def alike(prompts: Iterable[Tokens], *, share: bool = True) -> list[Run]:
    """Neighbours that begin with the same tokens. One more joins where that does not lessen how many tokens are saved;
    each keeps a token of its own. share: false: each prompt is a run of its own."""
    runs: list[Run] = []
    for prompt in prompts:
        _add(runs, prompt, share)
    return runs


def how_many_fit(prompts: Iterable[Tokens], most_tokens: int, *, share: bool = True) -> int:
    """How many of them, from the first on, make a stream of at most so many tokens; at least one."""
    runs: list[Run] = []
    count = 0
    for prompt in prompts:
        _add(runs, prompt, share)
        if count and stream_tokens(runs) > most_tokens:
            break
        count += 1
    return count


def stream_tokens(runs: Sequence[Run]) -> int:
    """Tokens that a stream of these prompts has."""
    return sum(shared + sum(len(own) - shared for own in run) for shared, run in runs)


def _add(runs: list[Run], prompt: Tokens, share: bool) -> None:
    if runs and share:
        shared, run = runs[-1]
        most = min(shared or len(run[0]) - 1, len(prompt) - 1)
        common = shared_tokens(run[0][:most], prompt[:most])
        if common >= LEAST_SHARED and common * len(run) >= shared * (len(run) - 1):
            runs[-1] = common, [*run, prompt]
            return
    runs.append((0, [prompt]))


def shared_tokens(first: Tokens, second: Tokens) -> int:
    """How many tokens two sequences begin with that are the same."""
    shorter = min(len(first), len(second))
    differ = np.nonzero(np.array(first[:shorter]) != np.array(second[:shorter]))[0]
    return int(differ[0]) if len(differ) else shorter


def _group(shared: int, prompts: Sequence[Tokens]) -> Group:
    own = prompts if not shared else [prompts[0][:shared], *(prompt[shared:] for prompt in prompts)]
    ids, lengths = np.array([token for part in own for token in part], dtype=np.int32), tuple(map(len, own))
    return Group("", ids, lengths, ((),) * len(lengths))
