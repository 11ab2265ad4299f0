"""Frozen linear layers whose weights stay quantised in memory (QLoRA, Dettmers et al. 2023).

A weight is made whole for the length of one product, in the forward and again in the backward pass; nothing whole is
kept between. Only the linear layers of the blocks are packed: embedding, head and norms stay in the compute dtype.

    nf4    4 bits with double quantisation, by the bitsandbytes package, from any safetensors folder
    gguf   the blocks of a GGUF file as they are (trainer.models.gguf_blocks)

Letters: T tokens, I inner width (columns), O outer width (rows).
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.errors import ConfigError, ModelError
from trainer.models import gguf_blocks
from trainer.models.decoder import Decoder
from trainer.models.gguf_tensors import PackedTensor, iter_packed
from trainer.models.hf_weights import hf_name, iter_weights


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


class Nf4Weight(PackedWeight):
    """4-bit NormalFloat in blocks of 64 with scales of 8 bits: 4.13 bits a weight (bitsandbytes)."""

    def __init__(self, weight: Tensor) -> None:
        """weight: (O, I), any floating dtype. Raises ConfigError without bitsandbytes."""
        super().__init__()
        functional = bitsandbytes()
        self.shape = tuple(weight.shape)
        data, state = functional.quantize_4bit(weight.float(), blocksize=64, compress_statistics=True, quant_type="nf4")
        tensors = {"data": data, "absmax": state.absmax, "code": state.code, "offset": state.offset}
        tensors |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.block, self.nested_block = state.blocksize, state.state2.blocksize

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        functional = bitsandbytes()
        nested = functional.QuantState(
            absmax=self.nested_absmax, code=self.nested_code, blocksize=self.nested_block, dtype=torch.float32
        )
        state = functional.QuantState(
            absmax=self.absmax, shape=torch.Size(self.shape), code=self.code, blocksize=self.block, quant_type="nf4",
            dtype=dtype, offset=self.offset, state2=nested,
        )  # fmt: skip
        return functional.dequantize_4bit(self.data, state)


class GgufWeight(PackedWeight):
    """The blocks of one tensor of a GGUF, rows in Hugging Face's order."""

    def __init__(self, data: Tensor, kind: str, shape: tuple[int, int]) -> None:
        """data: uint8 (O, bytes a row). kind: a key of gguf_blocks.LAYOUTS."""
        super().__init__()
        self.shape, self.kind = shape, kind
        self.register_buffer("data", data)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return gguf_blocks.dequantise(self.data, self.kind).to(dtype)


class PlainWeight(PackedWeight):
    """A weight that the GGUF does not quantise, in the compute dtype."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.register_buffer("data", weight)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return self.data.to(dtype)


def bitsandbytes() -> Any:
    """The functions of the bitsandbytes package. Raises ConfigError where it is missing or does not work."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it looks for a package that has our `kernels`' name
    try:
        from bitsandbytes import functional  # optional
    except Exception as error:  # a missing library shows as any kind of exception
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not work here ({error!r})"
        problem = f"the package bitsandbytes {why}; pip install 'logratio[qlora]', or use gguf"
        raise ConfigError("model.quantise", "nf4", problem) from None
    return functional


def pack_linears(model: Decoder) -> None:
    """On the meta device: a QuantisedLinear, still without weights, in place of every linear layer of the blocks."""
    for name, module in list(model.named_modules()):
        if name.startswith("layers.") and isinstance(module, nn.Linear):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, QuantisedLinear(module))


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a packed weight, or room for one, by their names in the model."""
    linears = (item for item in model.named_modules() if isinstance(item[1], nn.Linear))
    return {name: module for name, module in linears if hasattr(module, "packed")}


Tensors = Iterator[tuple[Path, str, Tensor]]


def pack_nf4(model: Decoder, folder: str | Path) -> Tensors:
    """Pack the blocks' weights as they are read, one whole in memory at a time; yields the other tensors."""
    layers = _layers_to_fill(model)
    for path, name, tensor in iter_weights(folder):
        if (layer := layers.pop(name, None)) is None:
            yield path, name, tensor
            continue
        _check_shape(path, name, tuple(tensor.shape), layer)
        layer.packed = Nf4Weight(tensor)
    _check_filled(folder, layers)


def pack_gguf(model: Decoder, path: str | Path, *, dtype: torch.dtype) -> Tensors:
    """Take the blocks' weights over as the GGUF has them; yields the other tensors, dequantised. dtype: of weights
    that the file does not quantise."""
    layers = _layers_to_fill(model)
    for packed in iter_packed(path):
        layer = layers.pop(packed.name, None)
        if layer is None:
            yield Path(path), packed.name, _whole(packed)
            continue
        _check_shape(path, packed.name, tuple(packed.shape), layer)
        if packed.kind in gguf_blocks.LAYOUTS and packed.offset == 0:
            data = packed.data if packed.rows is None else packed.data[packed.rows]
            layer.packed = GgufWeight(torch.tensor(data), packed.kind, packed.shape)
        elif packed.kind in ("F32", "F16", "BF16"):
            layer.packed = PlainWeight(_whole(packed).to(dtype))
        else:
            known = ", ".join(gguf_blocks.LAYOUTS)
            raise ModelError(path, f"tensor {packed.name!r} is {packed.kind}, which is not kept packed; known: {known}")
    _check_filled(path, layers)


def _whole(packed: PackedTensor) -> Tensor:
    """float32 values."""
    values = gguf.quants.dequantize(packed.data, gguf.GGMLQuantizationType[packed.kind]).reshape(packed.shape)
    if packed.rows is not None:
        values = values[packed.rows]
    return torch.tensor(values + np.float32(packed.offset))


def _layers_to_fill(model: Decoder) -> dict[str, nn.Module]:
    return {hf_name(f"{name}.weight"): layer for name, layer in packed_layers(model).items()}


def _check_shape(path: str | Path, name: str, shape: tuple[int, ...], layer: nn.Module) -> None:
    wanted = (layer.out_features, layer.in_features)
    if shape != wanted:
        raise ModelError(path, f"tensor {name!r} has shape {shape}, config.json asks for {wanted}")


def _check_filled(path: str | Path, left: dict[str, nn.Module]) -> None:
    if left:
        raise ModelError(path, f"{len(left)} tensors are missing, the first is {sorted(left)[0]!r}; download it again")
