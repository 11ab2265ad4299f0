"""Frozen linear layers whose weights stay quantised in memory (QLoRA, Dettmers et al. 2023).

A weight is made whole for the length of one product, in the forward and again in the backward pass; nothing whole is
kept between. Only the linear layers of the blocks are packed: embedding, head and norms stay in the compute dtype.

    nf4    4 bits with double quantisation, by the bitsandbytes package, from any safetensors folder
    gguf   the blocks of a GGUF file as they are (trainer.models.gguf_blocks)

Letters: T tokens, I inner width (columns), O outer width (rows).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class PackedWeight(nn.Module):
    """A weight (O, I) in some packed form; its tensors are buffers, so that they move with the model."""

    shape: tuple[int, int]

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in `dtype`, made anew at every call."""
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """Held in memory."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


class QuantisedLinear(nn.Linear):
    """A frozen linear layer with a packed weight; `weight` is None."""

    def __init__(self, base: nn.Linear) -> None:
        """base: the layer to replace, on the meta device; `packed` is to be set before the first call."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_parameter("weight", None)
        self.bias = base.bias
        self.packed: PackedWeight | None = None
        self.requires_grad_(False)

    def forward(self, x_TI: Tensor) -> Tensor:
        return packed_linear(x_TI, self.packed, self.bias)


class _PackedProduct(torch.autograd.Function):
    """(x (T, I), packed) -> x @ W.T. Keeps neither x nor W: the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return x @ packed.dequantise(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad @ ctx.packed.dequantise(grad.dtype) if ctx.needs_input_grad[0] else None), None


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """x @ W.T + bias, (T, O) in x's dtype; gradient flows into `x` (and `bias`) only."""
    product = _PackedProduct.apply(x, packed)
    return product if bias is None else product.add_(bias)
