"""Prefix-shared attention over a stream, on the CPU.

A token attends to the tokens of its own group that are not later and that belong to the prompt or to its own branch;
with a sliding window, to those among them at most window - 1 positions before it. Positions are those of the sequence
prompt + branch, not of the stream.
Rows are worked off in blocks of one branch (or of one short group). A block's keys are the prompt's tokens and the
branch's own up to the block's last row, so other branches cost nothing and memory does not grow with the square of the
length. Blocks are padded to multiples of `STEP` and those of one size are worked off together: few products of few
shapes, since the library behind torch.bmm builds and keeps a program of about 1 MB for every shape it meets.

Letters: T tokens of the stream, B blocks of a batch, n rows of a block, m its keys, H query heads, K key-value heads,
R = H / K, h head width.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.reference import compute_dtype
from trainer.batch import GroupLayout

ROWS = 256
"""Most query rows of a block."""

WHOLE_GROUP = 128
"""Groups of at most this many tokens are one block."""

STEP = 16
"""Blocks are padded to a multiple of this many rows and keys."""

BATCH_SCORES = 1 << 18
"""Most scores (rows x keys) a head in one batch of blocks: in float32 they should stay in the processor's cache."""


def allowed_mask(lengths: tuple[int, ...], window: int | None = None) -> Tensor:
    """(L, L) bool: may the row's token attend to the column's token? The definition the blocks are tested against."""
    branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order, positions = torch.arange(branch.numel()), group_positions(lengths)
    allowed = (order[None, :] <= order[:, None]) & ((branch[None, :] == 0) | (branch[None, :] == branch[:, None]))
    return allowed if window is None else allowed & (positions[:, None] - positions[None, :] < window)


def group_positions(lengths: tuple[int, ...]) -> Tensor:
    """(L,) positions of a group's tokens, each branch going on from the prompt."""
    starts = [0, *[lengths[0]] * (len(lengths) - 1)]
    return torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])


class Block(NamedTuple):
    """Query rows (n,) and keys (m,) as stream positions, and which keys each row may see, (n, m) bool."""

    rows: Tensor
    keys: Tensor
    allowed: Tensor


class BlockBatch(NamedTuple):
    """B blocks of one padded size, and where their rows and keys lie in the stream.

    places, key_places: (B, n) and (B, m) stream positions; T, one past the stream, is a padded entry.
    mask (B, n, m) float32: 0, or -inf where a row may not see a key.
    """

    places: Tensor
    key_places: Tensor
    mask: Tensor


class HeadBatch(NamedTuple):
    """A `BlockBatch` for H query and K key-value heads: indices into (T H, h) and (T K, h) matrices.

    rows (B K R n,), keys (B K m,): where to read, 0 for a padded entry. row_places, key_places: where results go, the
    row past the last for a padded entry. mask (B, 1, n, m) in the dtype of the scores.
    """

    rows: Tensor
    keys: Tensor
    row_places: Tensor
    key_places: Tensor
    mask: Tensor


def row_blocks(layout: Sequence[GroupLayout], window: int | None = None) -> list[Block]:
    """Blocks that cover every token of the groups once. Keys that no row of a block sees are not among its keys."""
    blocks = []
    for group in layout:
        if group.stop - group.start <= WHOLE_GROUP:
            whole = torch.arange(group.start, group.stop)
            blocks.append(Block(whole, whole, allowed_mask(group.lengths, window)))
            continue
        start, positions = group.start, group_positions(group.lengths)
        prompt = torch.arange(start, start)
        for branch, length in enumerate(group.lengths):
            for first in range(start, start + length, ROWS):
                last = min(first + ROWS, start + length)
                rows, keys = torch.arange(first, last), torch.cat([prompt, torch.arange(start, last)])
                if window is not None:
                    keys = keys[positions[first - group.start] - positions[keys - group.start] < window]
                allowed = keys[None, :] <= rows[:, None]
                if window is not None:
                    distance = positions[rows - group.start][:, None] - positions[keys - group.start][None, :]
                    allowed &= distance < window
                blocks.append(Block(rows, keys, allowed))
            if branch == 0:
                prompt = torch.arange(start, start + length)
            start += length
    return blocks


def batch_blocks(layout: Sequence[GroupLayout], num_tokens: int, window: int | None = None) -> list[BlockBatch]:
    """The layout's blocks, padded and put together by size; made once a stream and shared by all layers.

    num_tokens: T, at least the last group's end; tokens beyond the groups attend to nothing and get zeros.
    """
    by_size: dict[tuple[int, int], list[Block]] = defaultdict(list)
    for block in row_blocks(layout, window):
        if len(block.rows):
            by_size[_rounded_up(len(block.rows)), _rounded_up(len(block.keys))].append(block)
    batches = []
    for (rows, keys), blocks in sorted(by_size.items(), key=lambda item: item[0]):
        start = 0
        while start < len(blocks):
            # powers of two, so that the number of blocks does not make another shape each time
            count = 1 << (min(len(blocks) - start, max(1, BATCH_SCORES // (rows * keys))).bit_length() - 1)
            batches.append(_batch(blocks[start : start + count], rows, keys, num_tokens))
            start += count
    return batches


def _rounded_up(length: int) -> int:
    return -(-length // STEP) * STEP


def _batch(blocks: Sequence[Block], rows: int, keys: int, num_tokens: int) -> BlockBatch:
    places = torch.full((len(blocks), rows), num_tokens)
    key_places = torch.full((len(blocks), keys), num_tokens)
    mask = torch.zeros(len(blocks), rows, keys)
    for index, block in enumerate(blocks):
        own_rows, own_keys = block.allowed.shape
        places[index, :own_rows] = block.rows
        key_places[index, :own_keys] = block.keys
        mask[index, :, own_keys:] = float("-inf")
        mask[index, :own_rows, :own_keys].masked_fill_(~block.allowed, float("-inf"))
    return BlockBatch(places, key_places, mask)


def head_batches(
    batches: Sequence[BlockBatch], num_tokens: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> list[HeadBatch]:
    """The same for every layer, so made once a stream: one index then moves a tensor into its blocks, heads first."""
    query_heads = torch.arange(num_heads).view(1, num_kv_heads, -1, 1)
    kv_heads = torch.arange(num_kv_heads).view(1, num_kv_heads, 1)
    made = []
    for batch in batches:
        row_places, rows = _flat(batch.places[:, None, None, :], query_heads, num_tokens, num_heads)
        key_places, keys = _flat(batch.key_places[:, None, :], kv_heads, num_tokens, num_kv_heads)
        made.append(HeadBatch(rows, keys, row_places, key_places, batch.mask[:, None].to(dtype)))
    return made


def _flat(places: Tensor, heads: Tensor, num_tokens: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Where to write and where to read in a (T heads, h) matrix."""
    write = torch.where(places < num_tokens, places * num_heads + heads, num_tokens * num_heads).flatten()
    return write, write.masked_fill(write == num_tokens * num_heads, 0)


def stream_attention(
    q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, batches: Sequence[HeadBatch], softcap: float | None = None
) -> Tensor:
    """Softmax attention of every token over what it may see, (T, H, h).

    q_THh: (T, H, h), already scaled; k_TKh, v_TKh: (T, K, h), same dtype; `batches` of the stream. softcap: scores are
    softcap * tanh(score / softcap) (Gemma 2).
    """
    return _StreamAttention.apply(q_THh, k_TKh, v_TKh, batches, softcap)


class _StreamAttention(torch.autograd.Function):
    """Per batch of blocks: GEMM, softmax, GEMM. The backward forms the probabilities again, so nothing of the scores'
    size is kept; it needs five GEMMs.

    The R query heads that share a key-value head are stacked along the rows, so the GEMM itself sums their key and
    value gradients. The prompt's gradients, summed over its branches, are summed in float32. Padded rows get a zero
    gradient and padded keys -inf, so they add nothing; what they give goes to the row past the last, which is cut off.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, batches: Sequence[HeadBatch], softcap: float | None
    ) -> Tensor:
        flat_q, flat_k, flat_v = (x.reshape(-1, x.shape[-1]) for x in (q, k, v))
        out = flat_q.new_zeros(len(flat_q) + 1, q.shape[-1])
        for batch in batches:
            keys, values = (_gather(x, batch.keys, batch.mask.shape[3]) for x in (flat_k, flat_v))
            queries = _gather(flat_q, batch.rows, _stacked_rows(batch, q, k))
            probs, _ = _probs(queries, keys, batch.mask, softcap)
            out.index_copy_(0, batch.row_places, torch.bmm(probs, values).flatten(0, 1))
        ctx.save_for_backward(q, k, v)
        ctx.batches, ctx.softcap = batches, softcap
        return out[:-1].view_as(q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        head_dim, wide = q.shape[-1], compute_dtype(k.dtype)
        flat_q, flat_k, flat_v, flat_grad = (x.reshape(-1, head_dim) for x in (q, k, v, grad))
        flat_grad = torch.cat([flat_grad, flat_grad.new_zeros(1, head_dim)])
        grad_q = flat_q.new_zeros(len(flat_q) + 1, head_dim)
        grad_k, grad_v = (flat_k.new_zeros(len(flat_k) + 1, head_dim, dtype=wide) for _ in range(2))
        for batch in ctx.batches:
            stacked = _stacked_rows(batch, q, k)
            keys, values = (_gather(x, batch.keys, batch.mask.shape[3]) for x in (flat_k, flat_v))
            queries, grads = _gather(flat_q, batch.rows, stacked), _gather(flat_grad, batch.row_places, stacked)
            probs, slope = _probs(queries, keys, batch.mask, ctx.softcap)
            grad_v.index_add_(0, batch.key_places, torch.bmm(probs.transpose(1, 2), grads).flatten(0, 1).to(wide))
            grad_probs = torch.bmm(grads, values.transpose(1, 2))
            # probs * (grad_probs - their mean under probs), in float32 inside
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            grad_scores = grad_scores if slope is None else grad_scores.mul_(slope)
            grad_q.index_copy_(0, batch.row_places, torch.bmm(grad_scores, keys).flatten(0, 1))
            part = torch.bmm(grad_scores.transpose(1, 2), queries)
            grad_k.index_add_(0, batch.key_places, part.flatten(0, 1).to(wide))
        return (
            grad_q[:-1].view_as(q),
            grad_k[:-1].to(k.dtype).view_as(k),
            grad_v[:-1].to(v.dtype).view_as(v),
            None,
            None,
        )


def _stacked_rows(batch: HeadBatch, q: Tensor, k: Tensor) -> int:
    """R n."""
    return q.shape[1] // k.shape[1] * batch.mask.shape[2]


def _gather(flat: Tensor, index: Tensor, rows: int) -> Tensor:
    """Rows of (T heads, h) as (B K, rows, h)."""
    return flat.index_select(0, index).view(-1, rows, flat.shape[-1])


def _probs(queries: Tensor, keys: Tensor, mask: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """(B K, R n, m) softmax over the keys that each row may see, rounded once to the inputs' dtype; and the derivative
    of capped scores by scores, 1 - tanh^2, where there is a softcap.

    torch.softmax, not exp of a difference: the latter takes up to 40 times as long where the result is denormal.
    """
    scores, slope = torch.bmm(queries, keys.transpose(1, 2)), None
    if softcap is not None:
        bent = scores.div_(softcap).tanh_()
        slope = 1.0 - bent.square()
        scores = bent.mul_(softcap)
    blocks, _, rows, columns = mask.shape
    scores.view(blocks, -1, rows, columns).add_(mask)
    return torch.softmax(scores, dim=-1, out=scores), slope
