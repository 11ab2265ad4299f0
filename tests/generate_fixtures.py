"""Prompts to draw from, and completions by prompt and number. Not a test."""

import numpy as np

from eval.generate import Completion, Request
from eval.sampling import SamplingOptions

GREEDY = SamplingOptions(max_tokens=24, temperature=0)
LENGTHS = (3, 11, 1, 17, 6, 30, 2)


def requests_of(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> list[Request]:
    numbers = np.random.default_rng(seed)
    return [
        Request(f"p{index}", tuple(numbers.integers(3, vocabulary, length).tolist()))
        for index, length in enumerate(lengths)
    ]


def alike_requests(vocabulary: int, shared: int = 20) -> list[Request]:
    """Prompts that begin with the same tokens; one is nothing else, one is one token longer."""
    begin = requests_of((shared,), vocabulary, seed=1)[0].prompt_ids
    ends = requests_of((9, 1, 4), vocabulary, seed=2)
    return [Request(f"alike{index}", begin + own.prompt_ids) for index, own in enumerate(ends)] + [
        Request("beginning", begin)
    ]


def by_key(completions: list[Completion]) -> dict[tuple[str, int], Completion]:
    found = {(each.request_id, each.sample): each for each in completions}
    assert len(found) == len(completions)
    return found
