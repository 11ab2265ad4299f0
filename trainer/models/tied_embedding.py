"""One matrix that is both embedding and head: the embedding's gradient is added to the head's, in place.

Plain autograd makes a second dense (V, D) gradient for the few rows that a micro-batch's tokens have, and a third one
for the sum, all at the end of the backward pass, which is the peak of memory of a sharded run.
Letters: T tokens, U distinct ones of them, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.reference import compute_dtype


def embed_tied(weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `tokens`, (T, D), and the matrix (V, D) to use as the head's weight.

    weight (V, D), tokens (T,) int64. Gradients of both results flow into `weight`, once. The head's is written to, and
    must not be kept by whoever made it. A token's gradients are summed in float32 (float64) and rounded once.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.embedding(tokens, weight), weight
    for_rows, for_head = _TwoUses.apply(weight)
    return _Rows.apply(for_rows, tokens), for_head


class _TwoUses(torch.autograd.Function):
    """The weight twice, so that one place gets both gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_rows: Tensor | None, by_head: Tensor | None) -> Tensor | None:
        if by_rows is None or by_head is None:  # a use that no loss depends on
            return by_head if by_rows is None else by_rows.to_dense()
        return by_head.index_add_(0, by_rows.indices()[0], by_rows.values())


class _Rows(torch.autograd.Function):
    """F.embedding with a sparse gradient of one row a distinct token, in ascending order."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        distinct_U, place_T = tokens.unique(return_inverse=True)
        wide = compute_dtype(grad_TD.dtype)
        rows_UD = grad_TD.new_zeros(len(distinct_U), grad_TD.shape[1], dtype=wide)
        rows_UD.index_add_(0, place_T, grad_TD.to(wide))
        values_UD = rows_UD.to(grad_TD.dtype)
        sparse = torch.sparse_coo_tensor(
            distinct_U[None], values_UD, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return sparse, None
