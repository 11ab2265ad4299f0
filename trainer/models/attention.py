"""Prefix-shared attention over a stream, on the CPU.

A token attends to the tokens of its own group that are not later and that belong to the prompt or to its own branch.
Rows are worked off in blocks of one branch (or of one short group). A block's keys are the prompt's tokens and the
branch's own up to the block's last row, so other branches cost nothing and memory does not grow with the square of the
length. Blocks are padded to multiples of `STEP` and those of one size are worked off together: few products of few
shapes, since the library behind torch.bmm builds and keeps a program of about 1 MB for every shape it meets.

Letters: T tokens of the stream, B blocks of a batch, n rows of a block, m its keys, H query heads, K key-value heads,
R = H / K, h head width.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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


def allowed_mask(lengths: tuple[int, ...]) -> Tensor:
    """(L, L) bool: may the row's token attend to the column's token? The definition the blocks are tested against."""
    branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.arange(branch.numel())
    not_later = order[None, :] <= order[:, None]
    return not_later & ((branch[None, :] == 0) | (branch[None, :] == branch[:, None]))


class Block(NamedTuple):
    """Query rows (n,) and keys (m,) as stream positions, and which keys each row may see, (n, m) bool."""

    rows: Tensor
    keys: Tensor
    allowed: Tensor


class BlockBatch(NamedTuple):
    """B blocks of one padded size.

    rows (B n,), keys (B m,): stream positions; a padded entry is 0 in `rows` and `keys`, and T, one past the stream,
    in `row_places` and `key_places`, which say where results go. mask (B, 1, n, m) float32: 0, or -inf where a row may
    not see a key.
    """

    rows: Tensor
    keys: Tensor
    row_places: Tensor
    key_places: Tensor
    mask: Tensor


def row_blocks(layout: Sequence[GroupLayout]) -> list[Block]:
    """Blocks that cover every token of the groups once."""
    blocks = []
    for group in layout:
        if group.stop - group.start <= WHOLE_GROUP:
            whole = torch.arange(group.start, group.stop)
            blocks.append(Block(whole, whole, allowed_mask(group.lengths)))
            continue
        start = group.start
        prompt = torch.arange(start, start)
        for branch, length in enumerate(group.lengths):
            for first in range(start, start + length, ROWS):
                last = min(first + ROWS, start + length)
                rows, keys = torch.arange(first, last), torch.cat([prompt, torch.arange(start, last)])
                blocks.append(Block(rows, keys, keys[None, :] <= rows[:, None]))
            if branch == 0:
                prompt = torch.arange(start, start + length)
            start += length
    return blocks


def batch_blocks(layout: Sequence[GroupLayout], num_tokens: int) -> list[BlockBatch]:
    """The layout's blocks, padded and put together by size; made once a stream and shared by all layers.

    num_tokens: T, at least the last group's end; tokens beyond the groups attend to nothing and get zeros.
    """
    by_size: dict[tuple[int, int], list[Block]] = defaultdict(list)
    for block in row_blocks(layout):
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
    row_places = torch.full((len(blocks), rows), num_tokens)
    key_places = torch.full((len(blocks), keys), num_tokens)
    mask = torch.zeros(len(blocks), 1, rows, keys)
    for index, block in enumerate(blocks):
        own_rows, own_keys = block.allowed.shape
        row_places[index, :own_rows] = block.rows
        key_places[index, :own_keys] = block.keys
        mask[index, :, :, own_keys:] = float("-inf")
        mask[index, 0, :own_rows, :own_keys].masked_fill_(~block.allowed, float("-inf"))
    row_places, key_places = row_places.flatten(), key_places.flatten()
    padded = (places.masked_fill(places == num_tokens, 0) for places in (row_places, key_places))
    return BlockBatch(*padded, row_places, key_places, mask)


def stream_attention(q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, batches: Sequence[BlockBatch]) -> Tensor:
    """Softmax attention of every token over what it may see, (T, H, h).

    q_THh: (T, H, h), already scaled by 1 / sqrt(h); k_TKh, v_TKh: (T, K, h), same dtype; `batches` of the stream.
    """
    return _StreamAttention.apply(q_THh, k_TKh, v_TKh, batches)


class _StreamAttention(torch.autograd.Function):
    """Per batch of blocks: GEMM, float32 softmax, GEMM. The backward forms the probabilities again, so nothing of the
    scores' size is kept; it needs five GEMMs.

    The R query heads that share a key-value head are stacked along the rows, so the GEMM itself sums their key and
    value gradients. The prompt's gradients, summed over its branches, are summed in float32. Padded rows get a zero
    gradient and padded keys -inf, so they add nothing; what they give goes to place T, which is cut off.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, batches: Sequence[BlockBatch]) -> Tensor:
        out = q.new_zeros(len(q) + 1, *q.shape[1:])
        for batch in batches:
            keys, values = (_by_kv_head(x.index_select(0, batch.keys), batch.mask.shape) for x in (k, v))
            probs = _probs(_by_query_head(q.index_select(0, batch.rows), batch, k.shape[1]), keys, batch)
            part = torch.bmm(probs.to(v.dtype), values)
            out.index_copy_(0, batch.row_places, _rows_of_query_heads(part, batch))
        out = out[:-1]
        ctx.save_for_backward(q, k, v, out)
        ctx.batches = batches
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        num_kv, wide = k.shape[1], compute_dtype(k.dtype)
        grad_q = q.new_zeros(len(q) + 1, *q.shape[1:])
        grad_k, grad_v = (k.new_zeros(len(k) + 1, *k.shape[1:], dtype=wide) for _ in range(2))
        row_dots = torch.cat([(grad * out).sum(dim=-1, dtype=wide), grad.new_zeros(1, q.shape[1], dtype=wide)])
        grad = torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])])
        for batch in ctx.batches:
            keys, values = (_by_kv_head(x.index_select(0, batch.keys), batch.mask.shape) for x in (k, v))
            queries = _by_query_head(q.index_select(0, batch.rows), batch, num_kv)
            grads = _by_query_head(grad.index_select(0, batch.row_places), batch, num_kv)
            row_dot = _by_query_head(row_dots.index_select(0, batch.row_places).unsqueeze(-1), batch, num_kv)
            probs = _probs(queries, keys, batch)
            _add_by_key(grad_v, torch.bmm(probs.to(v.dtype).transpose(1, 2), grads), batch)
            grad_probs = torch.bmm(grads, values.transpose(1, 2)).to(wide)
            grad_scores = probs.mul_(grad_probs.sub_(row_dot)).to(q.dtype)
            part = torch.bmm(grad_scores, keys)
            grad_q.index_copy_(0, batch.row_places, _rows_of_query_heads(part, batch))
            _add_by_key(grad_k, torch.bmm(grad_scores.transpose(1, 2), queries), batch)
        return grad_q[:-1], grad_k[:-1].to(k.dtype), grad_v[:-1].to(v.dtype), None


def _probs(queries: Tensor, keys: Tensor, batch: BlockBatch) -> Tensor:
    """(B K, R n, m) softmax over the keys that each row may see, in float32 (float64 for float64).

    torch.softmax, not exp of a difference: the latter takes up to 40 times as long where the result is denormal.
    """
    scores = torch.bmm(queries, keys.transpose(1, 2)).to(compute_dtype(queries.dtype))
    blocks, _, rows, columns = batch.mask.shape
    scores.view(blocks, -1, rows, columns).add_(batch.mask)
    return torch.softmax(scores, dim=-1, out=scores)


def _by_kv_head(x: Tensor, shape: torch.Size) -> Tensor:
    """(B m, K, h) -> (B K, m, h)."""
    return x.view(shape[0], shape[3], *x.shape[1:]).transpose(1, 2).flatten(0, 1)


def _by_query_head(x: Tensor, batch: BlockBatch, num_kv: int) -> Tensor:
    """(B n, H, h) -> (B K, R n, h)."""
    blocks, _, rows, _ = batch.mask.shape
    return x.view(blocks, rows, *x.shape[1:]).transpose(1, 2).reshape(blocks * num_kv, -1, x.shape[-1])


def _rows_of_query_heads(x: Tensor, batch: BlockBatch) -> Tensor:
    """(B K, R n, h) -> (B n, H, h)."""
    blocks, _, rows, _ = batch.mask.shape
    return x.view(blocks, -1, rows, x.shape[-1]).transpose(1, 2).flatten(0, 1)


def _add_by_key(total: Tensor, part: Tensor, batch: BlockBatch) -> None:
    """Add gradients (B K, m, h) to (T + 1, K, h) where their keys came from."""
    blocks, _, _, keys = batch.mask.shape
    part = part.view(blocks, -1, keys, part.shape[-1]).transpose(1, 2).flatten(0, 1)
    total.index_add_(0, batch.key_places, part.to(total.dtype))
