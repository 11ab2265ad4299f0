"""Bytes of a run with adapters, for `trainer.memory_plan`: the frozen base, packed or not, and what adapters add.

Letters: T tokens, r rank, F inner width, O outer width of a layer.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from trainer import adapt
from trainer.config import Config
from trainer.lora import LoRALinear, add_lora, block_linears
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder
from trainer.models.gguf_tensors import iter_packed
from trainer.models.hf_weights import hf_name
from trainer.numerics import COMPUTE_DTYPES


@dataclass(frozen=True)
class AdapterSizes:
    """What one rank holds; `shards` ranks hold a copy of the model between them."""

    frozen: int
    """Bytes of its rows of the base, with frozen copies of A and B where reference.mode = model needs them."""
    own: int
    """Numbers of its rows of what is trained."""
    whole: int
    """Numbers of all that is trained."""
    kept: int
    """Numbers that the adapters of one block add to what is kept of a token for the backward pass: r a layer, F for the
    input of the last product of the MLP, and with DoRA O a layer."""
    dequantised: int
    """Numbers of the largest packed weight, which is whole for the length of a product; 0: none is packed."""


@cache
def adapter_sizes(model: ModelConfig, config: Config, shards: int) -> AdapterSizes:
    """Sizes of `config` on a model of these shapes. Raises UserError where the adapter or the GGUF cannot be read."""
    itemsize = COMPUTE_DTYPES[config.train.dtype].itemsize
    settings = adapt.lora_settings(config)
    keep = config.lora.adapter is not None and config.reference.mode == "model"
    with torch.device("meta"):
        decoder = Decoder(model)
    packed = {f"{name}.weight" for name in block_linears(decoder)} if config.model.quantise != "none" else set()
    add_lora(decoder, settings, keep_start=torch.float32 if keep else None)
    frozen = own = whole = 0
    for name, parameter in decoder.named_parameters():
        rows = -(-len(parameter) // max(1, shards)) * math.prod(parameter.shape[1:])
        if parameter.requires_grad:
            own, whole = own + rows, whole + parameter.numel()
        elif name not in packed:
            frozen += rows * itemsize
    frozen += _packed_bytes(config, decoder) if packed else 0
    largest = max(layer.weight.numel() for layer in block_linears(decoder).values()) if packed else 0
    kept = sum(_kept(name, layer) for name, layer in decoder.layers[0].named_modules() if isinstance(layer, LoRALinear))
    return AdapterSizes(frozen, own, whole, kept, largest)


def _kept(name: str, layer: LoRALinear) -> int:
    last = name.startswith("mlp.") and layer.out_features < layer.in_features
    numbers = layer.settings.r + (layer.in_features if last else 0)
    return numbers + (layer.out_features if layer.settings.use_dora else 0)


def _packed_bytes(config: Config, decoder: Decoder) -> int:
    if config.model.quantise == "gguf":
        blocks = {hf_name(f"{name}.weight") for name in block_linears(decoder)}
        return sum(tensor.data.nbytes for tensor in iter_packed(config.model.gguf) if tensor.name in blocks)
    # 4 bits a weight, 8 bits a block of 64, 32 bits for 256 of those
    weights = sum(layer.weight.numel() for layer in block_linears(decoder).values())
    return round(weights * (4 + 8 / 64 + 32 / 64 / 256) / 8)
