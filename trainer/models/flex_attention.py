"""Prefix-shared attention as one call of PyTorch's flex attention: the form for a GPU.

What a token may see is two runs of keys: the prompt of its group, and its own branch up to itself; a sliding window
lets them begin later. A `BlockMask` says
which tiles of BLOCK x BLOCK scores hold nothing to see (left out), nothing but what may be seen (no rule asked), or
both. It is made once a stream, in memory that grows with T * T / BLOCK.

Compiled on a GPU. On a CPU PyTorch has no backward of it, and this calls the uncompiled form, for tests.
Letters: T tokens of the stream, H query heads, K key-value heads, h head width, Q tiles along rows and along keys.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from trainer.batch import GroupLayout
from trainer.models.attention import group_positions

BLOCK = 128
"""Rows and keys of a tile of the mask; what PyTorch's kernels are made for."""


class KeyRuns(NamedTuple):
    """What each token may see, (T,) int32 stream positions: keys in [prompt_start, prompt_stop) and from own_start to
    the token itself. Both runs of a token that belongs to no group are empty."""

    prompt_start: Tensor
    prompt_stop: Tensor
    own_start: Tensor


def key_runs(layout: Sequence[GroupLayout], num_tokens: int, window: int | None = None) -> KeyRuns:
    """The runs of a stream of T = num_tokens tokens, the last of which may lie behind the groups.

    window: a token sees as many positions, its own included; None: all.
    """
    prompt_start, prompt_stop = (torch.zeros(num_tokens, dtype=torch.int32) for _ in range(2))
    own_start = torch.full((num_tokens,), num_tokens, dtype=torch.int32)
    for group in layout:
        prompt_end = group.start + group.lengths[0]
        prompt_start[prompt_end : group.stop] = group.start
        prompt_stop[prompt_end : group.stop] = prompt_end
        start = group.start
        for length in group.lengths:
            own_start[start : start + length] = start
            start += length
        if window is not None:  # the first position that is seen, as a place in the prompt and in the own branch
            inside = slice(group.start, group.stop)
            first = (group_positions(group.lengths) - (window - 1)).clamp(min=0).to(torch.int32)
            prompt_start[inside] = torch.minimum(prompt_start[inside] + first, prompt_stop[inside])
            is_prompt = torch.arange(group.start, group.stop) < prompt_end
            own_start[inside] += torch.where(is_prompt, first, (first - group.lengths[0]).clamp(min=0))
    return KeyRuns(prompt_start, prompt_stop, own_start)


def block_mask(
    layout: Sequence[GroupLayout], num_tokens: int, device: torch.device, window: int | None = None
) -> BlockMask:
    """The mask of a stream of T = num_tokens tokens, on `device`, for all layers of one window and all heads."""
    prompt_start, prompt_stop, own_start = (values.to(device) for values in key_runs(layout, num_tokens, window))

    def may_see(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = (own_start[row] <= key) & (key <= row)
        return own | ((prompt_start[row] <= key) & (key < prompt_stop[row]))

    tile_start = torch.arange(0, num_tokens, BLOCK, device=device)

    def keys_by_tile(start: Tensor, stop: Tensor) -> Tensor:
        """(T, Q): how many of a token's keys [start, stop) lie in each tile."""
        first = torch.maximum(start[:, None], tile_start)
        return (torch.minimum(stop[:, None], tile_start + BLOCK) - first).clamp(min=0)

    own_stop = torch.arange(1, num_tokens + 1, device=device)
    seen_TQ = keys_by_tile(prompt_start, prompt_stop) + keys_by_tile(own_start, own_stop)
    seen_QQ = F.pad(seen_TQ, (0, 0, 0, -num_tokens % BLOCK)).unflatten(0, (-1, BLOCK)).sum(1)
    full_QQ = seen_QQ == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_tile_lists((seen_QQ > 0) & ~full_QQ),
        *_tile_lists(full_QQ),
        BLOCK_SIZE=BLOCK,
        mask_mod=may_see,
        seq_lengths=(num_tokens, num_tokens),
    )


def _tile_lists(tiles_QQ: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each row of tiles has, (1, 1, Q), and their columns, those first that count, (1, 1, Q, Q)."""
    columns = torch.argsort(tiles_QQ.int(), dim=-1, descending=True, stable=True)
    return tiles_QQ.sum(-1).int()[None, None], columns.int()[None, None]


def masked_attention(
    q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, mask: BlockMask, softcap: float | None = None
) -> Tensor:
    """Softmax attention of every token over what `mask` lets it see, (T, H, h); zeros where that is nothing.

    q_THh: (T, H, h), already scaled; k_TKh, v_TKh: (T, K, h), same dtype. softcap: scores are
    softcap * tanh(score / softcap). On a CPU without gradient.
    """
    q_1HTh, k_1KTh, v_1KTh = (x.transpose(0, 1).unsqueeze(0) for x in (q_THh, k_TKh, v_TKh))
    function = _compiled() if q_THh.is_cuda else flex_attention
    shared_heads = q_THh.shape[1] != k_TKh.shape[1]
    cap = None if softcap is None else _capped(softcap)
    out_1HTh = function(q_1HTh, k_1KTh, v_1KTh, score_mod=cap, block_mask=mask, scale=1.0, enable_gqa=shared_heads)
    return out_1HTh.squeeze(0).transpose(0, 1)


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """One function for all calls, so that the compiled program is the same."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """One program for streams of every length. fullgraph: PyTorch raises where it could not compile; without it, it
    would go on uncompiled and build the (H, T, T) scores."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
