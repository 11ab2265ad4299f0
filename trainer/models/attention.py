"""Prefix-shared attention over a stream, on the CPU.

A token attends to the tokens of its own group that are not later and that belong to the prompt or to its own branch.
Each group is attended on its own, so nothing of size (T, T) over the stream is built.

Letters: T tokens of the stream, L tokens of a group, H query heads, K key-value heads, R = H / K, h head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.batch import GroupLayout

DENSE_MAX_TOKENS = 768
"""Groups up to this length use two batched GEMMs with the (K, R L, L) scores in memory; longer ones SDPA a branch."""


def allowed_mask(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """(L, L) bool: may the row's token attend to the column's token? The definition all paths are tested against."""
    branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    order = torch.arange(branch.numel(), device=device)
    not_later = order[None, :] <= order[:, None]
    return not_later & ((branch[None, :] == 0) | (branch[None, :] == branch[:, None]))


def additive_masks(layout: tuple[GroupLayout, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, ...]:
    """Per group (1, L, L) with 0 where attention is allowed and -inf elsewhere; None for groups that take SDPA.

    Made once a stream and shared by all layers.
    """
    masks = []
    for group in layout:
        if sum(group.lengths) > DENSE_MAX_TOKENS:
            masks.append(None)
            continue
        allowed = allowed_mask(group.lengths)
        masks.append(torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf")).unsqueeze(0))
    return tuple(masks)


def stream_attention(
    q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, layout: tuple[GroupLayout, ...], masks: tuple[Tensor | None, ...]
) -> Tensor:
    """Softmax attention of every token over what it may see, (T, H, h), scale 1/sqrt(h).

    q_THh: (T, H, h); k_TKh, v_TKh: (T, K, h), same dtype; `masks` from `additive_masks(layout)`.
    """
    outputs = []
    for group, mask in zip(layout, masks, strict=True):
        rows = slice(group.start, group.stop)
        q, k, v = q_THh[rows], k_TKh[rows], v_TKh[rows]
        if mask is None:
            outputs.append(_branchwise_sdpa(q, k, v, group.lengths))
        else:
            outputs.append(_DenseGroup.apply(q, k, v, mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _DenseGroup(torch.autograd.Function):
    """One group with its scores in memory: GEMM, float32 softmax, GEMM; the backward is five GEMMs.

    The R query heads that share a key-value head are stacked along the rows, so their key and value gradients are
    summed by the GEMM itself.
    """

    @staticmethod
    def forward(ctx, q_LHh: Tensor, k_LKh: Tensor, v_LKh: Tensor, mask: Tensor) -> Tensor:
        length, num_heads, width = q_LHh.shape
        num_kv = k_LKh.shape[1]
        rep = num_heads // num_kv
        q = _stack_heads(q_LHh, num_kv)
        k, v = k_LKh.transpose(0, 1).contiguous(), v_LKh.transpose(0, 1).contiguous()
        scores = torch.bmm(q, k.transpose(1, 2)).float().view(num_kv, rep, length, length)
        scores.mul_(width**-0.5).add_(mask)
        probs = torch.softmax(scores, dim=-1, out=scores).view(num_kv, rep * length, length).to(q.dtype)
        out = torch.bmm(probs, v)
        ctx.save_for_backward(q, k, v, probs, out)
        return _unstack_heads(out, length)

    @staticmethod
    def backward(ctx, grad_LHh: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, probs, out = ctx.saved_tensors
        length, scale = k.shape[1], q.shape[-1] ** -0.5
        grad = _stack_heads(grad_LHh, k.shape[0])
        grad_v = torch.bmm(probs.transpose(1, 2), grad)
        row_dot = (grad.float() * out.float()).sum(-1, keepdim=True)
        grad_scores = torch.bmm(grad, v.transpose(1, 2)).float().sub_(row_dot).mul_(probs).mul_(scale).to(q.dtype)
        grad_q = torch.bmm(grad_scores, k)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
        return _unstack_heads(grad_q, length), grad_k.transpose(0, 1), grad_v.transpose(0, 1), None


def _stack_heads(x_LHh: Tensor, num_kv: int) -> Tensor:
    """(L, H, h) -> (K, R L, h)."""
    length, num_heads, width = x_LHh.shape
    return x_LHh.transpose(0, 1).reshape(num_kv, num_heads // num_kv * length, width)


def _unstack_heads(x: Tensor, length: int) -> Tensor:
    """(K, R L, h) -> (L, H, h)."""
    return x.view(-1, length, x.shape[-1]).transpose(0, 1)


def _branchwise_sdpa(q_LHh: Tensor, k_LKh: Tensor, v_LKh: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Long groups: prompt and first branch are one causal sequence; each further branch attends to prompt + itself."""
    prompt = lengths[0]
    first = prompt + (lengths[1] if len(lengths) > 1 else 0)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_LHh, k_LKh, v_LKh))
    outputs = [_sdpa(q[:, :, :first], k[:, :, :first], v[:, :, :first], is_causal=True)]
    start = first
    for length in lengths[2:]:
        own = slice(start, start + length)
        keys = torch.cat([k[:, :, :prompt], k[:, :, own]], dim=2)
        values = torch.cat([v[:, :, :prompt], v[:, :, own]], dim=2)
        mask = torch.ones(length, prompt + length, dtype=torch.bool, device=q.device).tril_(prompt)
        outputs.append(_sdpa(q[:, :, own], keys, values, attn_mask=mask))
        start += length
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)
