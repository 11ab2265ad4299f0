"""Prefix-shared attention over a stream, on the CPU.

A token attends to the tokens of its own group that are not later and that belong to the prompt or to its own branch.
Rows are worked off in blocks of one branch each. The keys of a block are the prompt's tokens and the branch's own up to
the block's end, so only the last square of its scores needs a mask, other branches cost nothing, and nothing larger
than (H, ROWS, keys) is ever in memory, whatever the length. A short group is one block with a mask of its own: fewer,
larger products.

Letters: T tokens of the stream, n rows of a block, m its keys, H query heads, K key-value heads, R = H / K, h head
width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import compute_dtype
from trainer.batch import GroupLayout

ROWS = 256
"""Most query rows of a block: its scores, (H, ROWS, keys) in float32, should stay in the processor's cache."""

WHOLE_GROUP = 128
"""Groups of at most this many tokens are one block."""


def allowed_mask(lengths: tuple[int, ...]) -> Tensor:
    """(L, L) bool: may the row's token attend to the column's token? The definition the blocks are tested against."""
    branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.arange(branch.numel())
    not_later = order[None, :] <= order[:, None]
    return not_later & ((branch[None, :] == 0) | (branch[None, :] == branch[:, None]))


class Block(NamedTuple):
    """Query rows, the stream positions of their keys (`prompt`, then `own`), and what is hidden from them.

    mask: (n, c) float32, to add to the last c columns of the scores: 0, or -inf where the row may not see the key. All
    earlier keys are visible.
    """

    rows: slice
    prompt: slice
    own: slice
    mask: Tensor


def row_blocks(layout: Sequence[GroupLayout]) -> list[Block]:
    """Blocks that cover every token of the stream once; made once a stream and shared by all layers."""
    blocks = []
    for group in layout:
        whole, nothing = slice(group.start, group.stop), slice(group.start, group.start)
        if group.stop - group.start <= WHOLE_GROUP:
            blocks.append(Block(whole, nothing, whole, _additive(allowed_mask(group.lengths))))
            continue
        start, prompt = group.start, nothing
        for branch, length in enumerate(group.lengths):
            for first in range(start, start + length, ROWS):
                last = min(first + ROWS, start + length)
                causal = _additive(allowed_mask((last - first,)))
                blocks.append(Block(slice(first, last), prompt, slice(start, last), causal))
            if branch == 0:
                prompt = slice(start, start + length)
            start += length
    return blocks


def stream_attention(q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Softmax attention of every token over what it may see, (T, H, h).

    q_THh: (T, H, h), already scaled by 1 / sqrt(h); k_TKh, v_TKh: (T, K, h), same dtype; `blocks` of the stream.
    """
    return _StreamAttention.apply(q_THh, k_TKh, v_TKh, blocks)


class _StreamAttention(torch.autograd.Function):
    """Per block: GEMM, float32 softmax, GEMM. The backward forms the probabilities again, so nothing of the scores'
    size is kept; it needs five GEMMs.

    The R query heads that share a key-value head are stacked along the rows, so the GEMM itself sums their key and
    value gradients. The prompt's gradients, summed over its branches, are summed in float32.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> Tensor:
        out = torch.empty_like(q)
        for block in blocks:
            probs = _probs(_stack_heads(q[block.rows], k.shape[1]), _keys(k, block), block)
            out[block.rows] = _unstack_heads(torch.bmm(probs.to(v.dtype), _keys(v, block)), block)
        ctx.save_for_backward(q, k, v, out)
        ctx.blocks = blocks
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros(k.shape, dtype=compute_dtype(k.dtype)) for _ in range(2))
        row_dots = (grad * out).sum(dim=-1, dtype=compute_dtype(k.dtype))
        for block in ctx.blocks:
            queries, grads = (_stack_heads(x[block.rows], k.shape[1]) for x in (q, grad))
            keys = _keys(k, block)
            probs = _probs(queries, keys, block)
            _add_keys(grad_v, torch.bmm(probs.to(v.dtype).transpose(1, 2), grads), block)
            row_dot = _stack_heads(row_dots[block.rows].unsqueeze(-1), k.shape[1])
            grad_probs = torch.bmm(grads, _keys(v, block).transpose(1, 2)).to(probs.dtype)
            grad_scores = probs.mul_(grad_probs.sub_(row_dot)).to(q.dtype)
            grad_q[block.rows] = _unstack_heads(torch.bmm(grad_scores, keys), block)
            _add_keys(grad_k, torch.bmm(grad_scores.transpose(1, 2), queries), block)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))


def _probs(queries: Tensor, keys: Tensor, block: Block) -> Tensor:
    """(K, R n, m) softmax over the keys that each row may see, in float32 (float64 for float64).

    torch.softmax, not exp of a difference: the latter takes up to 40 times as long where the result is denormal.
    """
    scores = torch.bmm(queries, keys.transpose(1, 2)).to(compute_dtype(queries.dtype))
    rows, columns = block.mask.shape
    scores.view(-1, rows, scores.shape[-1])[:, :, -columns:].add_(block.mask)
    return torch.softmax(scores, dim=-1, out=scores)


def _keys(x_TKh: Tensor, block: Block) -> Tensor:
    """(K, m, h): the prompt's and the branch's own keys (or values) of a block."""
    own = x_TKh[block.own]
    both = torch.cat([x_TKh[block.prompt], own]) if block.prompt.stop > block.prompt.start else own
    return both.transpose(0, 1)


def _add_keys(total_TKh: Tensor, part: Tensor, block: Block) -> None:
    """Add a block's (K, m, h) gradients where its keys came from."""
    length = block.prompt.stop - block.prompt.start
    part = part.transpose(0, 1)
    total_TKh[block.prompt] += part[:length]
    total_TKh[block.own] += part[length:]


def _stack_heads(x_nHh: Tensor, num_kv: int) -> Tensor:
    """(n, H, h) -> (K, R n, h)."""
    rows, num_heads, width = x_nHh.shape
    return x_nHh.transpose(0, 1).reshape(num_kv, num_heads // num_kv * rows, width)


def _unstack_heads(x: Tensor, block: Block) -> Tensor:
    """(K, R n, h) -> (n, H, h)."""
    return x.view(-1, block.rows.stop - block.rows.start, x.shape[-1]).transpose(0, 1)
