"""Prefix-shared attention without a mask, for kernels that take packed sequences of different lengths.

Every branch attends to itself, causally; then the branches of a group, as one sequence of rows, attend to its prompt,
all of it. With log-sum-exps a and b of the two, the row's output is their outputs weighted by exp(a - c) and
exp(b - c), c = log(exp(a) + exp(b)).

The backward needs no derivative of the merging: a score's probability is exp(score - c), and its gradient is
probability * (grad . value - grad . out), with c and `out` of the whole row. That is what a flash kernel's backward
computes from the log-sum-exp and the output that it is given, so each part gets the merged ones and returns its share
(derived here). PyTorch's `varlen_attn` cannot be differentiated for this: it drops the gradient by its log-sum-exp.

Letters: T tokens of the stream, n rows and m keys of a part, H query heads, K key-value heads, R = H / K, h head width.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.reference import compute_dtype
from trainer.batch import GroupLayout


class Packing(NamedTuple):
    """Sequences one after another: rows and keys of sequence i are [cu_rows[i], cu_rows[i + 1]) and the same of keys.

    cu_rows, cu_keys: int32, on the device; most_rows, most_keys: of one sequence. causal: a row sees the keys up to its
    own place, and rows and keys are equally many.
    """

    cu_rows: Tensor
    cu_keys: Tensor
    most_rows: int
    most_keys: int
    causal: bool

    @staticmethod
    def of(rows: Sequence[int], keys: Sequence[int], *, causal: bool, device: torch.device) -> "Packing":
        """From the lengths of the sequences, at least one."""
        cu_rows, cu_keys = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (rows, keys)
        )
        return Packing(cu_rows, cu_keys, max(rows), max(keys), causal)


class MergePlan(NamedTuple):
    """own: every branch of the stream's first `num_tokens` tokens, the groups. prompts: the groups with a prompt and
    something behind it, or None; `rows` and `keys`, int64 stream positions, are the tokens that it takes."""

    num_tokens: int
    own: Packing
    prompts: Packing | None
    rows: Tensor
    keys: Tensor


def merge_plan(layout: Sequence[GroupLayout], device: torch.device) -> MergePlan:
    """What the two parts of a stream are, for all layers; the layout has at least one token."""
    branches = [length for group in layout for length in group.lengths if length]
    shared = [group for group in layout if 0 < group.lengths[0] < group.stop - group.start]
    prompt_ends = [group.start + group.lengths[0] for group in shared]
    rows = [torch.arange(end, group.stop) for group, end in zip(shared, prompt_ends, strict=True)]
    keys = [torch.arange(group.start, end) for group, end in zip(shared, prompt_ends, strict=True)]
    lengths = [len(part) for part in rows], [len(part) for part in keys]
    nothing = torch.arange(0)
    return MergePlan(
        layout[-1].stop,
        Packing.of(branches, branches, causal=True, device=device),
        Packing.of(*lengths, causal=False, device=device) if shared else None,
        torch.cat([nothing, *rows]).to(device),
        torch.cat([nothing, *keys]).to(device),
    )


def merged_attention(q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, plan: MergePlan) -> Tensor:
    """Softmax attention of every token over what it may see, (T, H, h); zeros behind the groups.

    q_THh: (T, H, h), already scaled by 1 / sqrt(h); k_TKh, v_TKh: (T, K, h), same dtype; `plan` of the stream.
    """
    return _MergedAttention.apply(q_THh, k_TKh, v_TKh, plan)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: MergePlan) -> Tensor:
        stop, rows, keys = plan.num_tokens, plan.rows, plan.keys
        out = torch.zeros_like(q)
        own_out, lse = attend(q[:stop], k[:stop], v[:stop], plan.own)
        out[:stop] = own_out
        if plan.prompts is not None:
            part, part_lse = attend(*_picked((q, rows), (k, keys), (v, keys)), plan.prompts)
            own_lse = lse.index_select(0, rows)
            merged_lse = torch.logaddexp(own_lse, part_lse)
            merged = (own_lse - merged_lse).exp()[:, :, None] * out.index_select(0, rows)
            merged += (part_lse - merged_lse).exp()[:, :, None] * part
            out.index_copy_(0, rows, merged.to(out.dtype))
            lse.index_copy_(0, rows, merged_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        plan: MergePlan = ctx.plan
        stop, rows, keys = plan.num_tokens, plan.rows, plan.keys
        totals = [torch.zeros_like(x) for x in (q, k, v)]
        parts = attend_backward(grad[:stop], q[:stop], k[:stop], v[:stop], out[:stop], lse, plan.own)
        for total, part in zip(totals, parts, strict=True):
            total[:stop] = part
        if plan.prompts is not None:
            picked = _picked((grad, rows), (q, rows), (k, keys), (v, keys), (out, rows), (lse, rows))
            parts = attend_backward(*picked, plan.prompts)
            for total, places, part in zip(totals, (rows, keys, keys), parts, strict=True):
                total.index_add_(0, places, part)
        return *totals, None


def _picked(*pairs: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    return (values.index_select(0, places) for values, places in pairs)


def attend(q_nHh: Tensor, k_mKh: Tensor, v_mKh: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Attention within each sequence: (n, H, h) in the inputs' dtype, and the log-sum-exp of each row's scores, (n, H)
    float32 (float64 for float64). Every row sees at least one key. No gradient: see `attend_backward`."""
    if _flash_takes(q_nHh):
        out_nHh, lse_Hn, *_ = torch.ops.aten._flash_attention_forward(
            q_nHh, k_mKh, v_mKh, *packing[:4], 0.0, packing.causal, False, scale=1.0
        )
        if lse_Hn.shape != (q_nHh.shape[1], len(q_nHh)):  # some ROCm builds pad it to (sequences, H, most rows)
            raise ValueError(
                f"kernels.attention 'merge': this PyTorch's flash attention gives a log-sum-exp of shape "
                f"{tuple(lse_Hn.shape)}, not (heads, rows); use 'flex' or 'blocks'"
            )
        return out_nHh, lse_Hn.T.contiguous()
    out, lse = torch.empty_like(q_nHh), q_nHh.new_empty(q_nHh.shape[:2], dtype=compute_dtype(q_nHh.dtype))
    for rows, keys in _sequences(packing):
        scores_KRnm = _scores(q_nHh[rows], k_mKh[keys], packing.causal)
        part_KRn = torch.logsumexp(scores_KRnm, -1)
        probs_KRnm = (scores_KRnm - part_KRn[..., None]).exp().to(v_mKh.dtype)
        out[rows] = torch.einsum("krnm,mkh->nkrh", probs_KRnm, v_mKh[keys]).flatten(1, 2)
        lse[rows] = part_KRn.flatten(0, 1).T
    return out, lse


def attend_backward(
    grad_nHh: Tensor, q_nHh: Tensor, k_mKh: Tensor, v_mKh: Tensor, out_nHh: Tensor, lse_nH: Tensor, packing: Packing
) -> tuple[Tensor, Tensor, Tensor]:
    """These keys' share of the gradients by q, k and v, in the inputs' dtype, where the rows' output and log-sum-exp,
    `out_nHh` and `lse_nH`, may be those over more keys."""
    if _flash_takes(q_nHh):
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q_nHh.device), q_nHh.new_empty(0)
        return torch.ops.aten._flash_attention_backward(
            *(grad_nHh.contiguous(), q_nHh, k_mKh, v_mKh, out_nHh, lse_nH.T.contiguous()),
            *(*packing[:4], 0.0, packing.causal, *no_dropout),
            scale=1.0,
        )
    num_kv = k_mKh.shape[1]
    row_dots = (grad_nHh * out_nHh).sum(-1, dtype=lse_nH.dtype)
    grads = torch.empty_like(q_nHh), torch.empty_like(k_mKh), torch.empty_like(v_mKh)
    for rows, keys in _sequences(packing):
        grad_nKRh, q_nKRh = (x[rows].unflatten(1, (num_kv, -1)) for x in (grad_nHh, q_nHh))
        lse_KRn1, dots_KRn1 = (x[rows].T.unflatten(0, (num_kv, -1))[..., None] for x in (lse_nH, row_dots))
        probs_KRnm = (_scores(q_nHh[rows], k_mKh[keys], packing.causal) - lse_KRn1).exp()
        grads[2][keys] = torch.einsum("krnm,nkrh->mkh", probs_KRnm.to(grad_nKRh.dtype), grad_nKRh)
        grad_probs_KRnm = torch.einsum("nkrh,mkh->krnm", grad_nKRh, v_mKh[keys]).to(lse_nH.dtype)
        grad_scores_KRnm = (probs_KRnm * (grad_probs_KRnm - dots_KRn1)).to(q_nHh.dtype)
        grads[0][rows] = torch.einsum("krnm,mkh->nkrh", grad_scores_KRnm, k_mKh[keys]).flatten(1, 2)
        grads[1][keys] = torch.einsum("krnm,nkrh->mkh", grad_scores_KRnm, q_nKRh)
    return grads


def _flash_takes(q: Tensor) -> bool:
    """Can PyTorch's flash attention be used? Otherwise plain products a sequence: right on any device, and slow."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _sequences(packing: Packing) -> Iterator[tuple[slice, slice]]:
    rows, keys = packing.cu_rows.tolist(), packing.cu_keys.tolist()
    for index in range(len(rows) - 1):
        yield slice(rows[index], rows[index + 1]), slice(keys[index], keys[index + 1])


def _scores(q_nHh: Tensor, k_mKh: Tensor, causal: bool) -> Tensor:
    """(K, R, n, m) of one sequence, -inf where a row may not look, in the dtype that sums are taken in."""
    q_nKRh = q_nHh.unflatten(1, (k_mKh.shape[1], -1))
    scores_KRnm = torch.einsum("nkrh,mkh->krnm", q_nKRh, k_mKh).to(compute_dtype(q_nHh.dtype))
    if causal:
        scores_KRnm = scores_KRnm.masked_fill(
            scores_KRnm.new_ones(scores_KRnm.shape[-2:]).triu(1).bool(), float("-inf")
        )
    return scores_KRnm
