"""Embedding and head as one matrix: its gradient against float64, and that it lies where the head's lay."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.tied_embedding import embed_tied

TOKENS = torch.tensor([3, 7, 3, 0, 3, 7, 9])
"""Token 3 three times: its gradients are summed."""


class Head(torch.autograd.Function):
    """x @ weight.T, which remembers where it put its weight's gradient."""

    place = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        by_weight = grad.T @ x
        Head.place = by_weight.data_ptr()
        return grad @ weight, by_weight


def gradient(weight: Tensor, *, tied: bool) -> Tensor:
    leaf = weight.clone().requires_grad_()
    rows, head = embed_tied(leaf, TOKENS) if tied else (F.embedding(TOKENS, leaf), leaf)
    (Head.apply(rows * 0.5, head).float() ** 2).sum().backward()
    assert leaf.grad is not None
    if tied:
        assert leaf.grad.data_ptr() == Head.place
    return leaf.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_gradients_are_added_into_the_heads(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    truth = gradient(weight.double(), tied=False)
    error, plain = ((gradient(weight, tied=tied).double() - truth).abs().max() for tied in (True, False))
    # the order of a sum's terms may differ from plain autograd's
    assert error <= 1.5 * plain + 1e-14 * truth.abs().max()


def test_one_use_alone_gets_its_gradient() -> None:
    weight = torch.ones(12, 8, requires_grad=True)
    rows, _ = embed_tied(weight, TOKENS)
    rows.sum().backward()
    assert weight.grad is not None
    counts = torch.bincount(TOKENS, minlength=12).float()
    assert torch.equal(weight.grad, counts[:, None].expand(12, 8))
    weight.grad = None
    _, head = embed_tied(weight, TOKENS)
    (2 * head).sum().backward()
    assert torch.equal(weight.grad, torch.full((12, 8), 2.0))


def test_without_gradient_the_weight_itself_is_the_head() -> None:
    weight = torch.randn(12, 8, requires_grad=True)
    with torch.no_grad():
        rows, head = embed_tied(weight, TOKENS)
    assert head is weight
    assert torch.equal(rows, weight[TOKENS])
    assert embed_tied(weight.detach(), TOKENS)[0].grad_fn is None
