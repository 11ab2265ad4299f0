"""Quantised blocks of a GGUF to numbers, in torch: for weights that stay packed in memory.

A row of a tensor is a whole number of blocks; a block is 32 or 256 weights with one or more scales. The layouts are
those of ggml (ggml-common.h: block_q4_0 and so on); tests/test_gguf_blocks.py compares every type with the `gguf`
package. Sums and products are done in place: these run twice a layer and step. Letters: B blocks of a tensor.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """weights and bytes of one block; unpack: uint8 (B, bytes) -> float32 (B, weights)."""

    weights: int
    num_bytes: int
    unpack: Callable[[Tensor], Tensor]


def dequantise(data: Tensor, kind: str) -> Tensor:
    """float32 weights of packed rows: uint8 (rows, bytes a row) -> (rows, weights a row). kind: a key of LAYOUTS."""
    layout = LAYOUTS[kind]
    return layout.unpack(data.reshape(-1, layout.num_bytes)).reshape(len(data), -1)


def _half(data_B2: Tensor) -> Tensor:
    """Two bytes as float16, in float32 (B, 1)."""
    return data_B2.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """The low halves of all bytes, then the high halves, along the last axis."""
    data = data.contiguous()
    return torch.cat([data & 15, data >> 4], dim=-1)


def _bits(data_B4: Tensor) -> Tensor:
    """(B, 32): the bits of four bytes, lowest first."""
    places = torch.arange(8, dtype=torch.uint8, device=data_B4.device)
    return ((data_B4[:, :, None] >> places) & 1).flatten(1)


def _q4_0(data: Tensor) -> Tensor:
    return _nibbles(data[:, 2:]).float().sub_(8).mul_(_half(data[:, :2]))


def _q4_1(data: Tensor) -> Tensor:
    return _nibbles(data[:, 4:]).float().mul_(_half(data[:, :2])).add_(_half(data[:, 2:4]))


def _q5_0(data: Tensor) -> Tensor:
    values = _nibbles(data[:, 6:]) | (_bits(data[:, 2:6]) << 4)
    return values.float().sub_(16).mul_(_half(data[:, :2]))


def _q5_1(data: Tensor) -> Tensor:
    values = _nibbles(data[:, 8:]) | (_bits(data[:, 4:8]) << 4)
    return values.float().mul_(_half(data[:, :2])).add_(_half(data[:, 2:4]))


def _q8_0(data: Tensor) -> Tensor:
    return data[:, 2:].view(torch.int8).float().mul_(_half(data[:, :2]))


def _scales_and_minima(data: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K, (B, 8, 1) each: 6 bits a number, eight of both in twelve bytes."""
    packed = data[:, 4:16].view(-1, 3, 4)
    first, second, rest = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 6) << 4)], dim=1).float() * _half(data[:, :2])
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 6) << 4)], dim=1).float() * _half(data[:, 2:4])
    return scales[:, :, None], minima[:, :, None]


def _q4_k(data: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(data)
    values = _nibbles(data[:, 16:].view(-1, 4, 32)).view(-1, 8, 32)
    return values.float().mul_(scales).sub_(minima).flatten(1)


def _q5_k(data: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(data)
    values = _nibbles(data[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    places = torch.arange(8, dtype=torch.uint8, device=data.device)[None, :, None]
    fifth = (data[:, 16:48][:, None] >> places) & 1
    return (values | (fifth << 4)).float().mul_(scales).sub_(minima).flatten(1)


def _q6_k(data: Tensor) -> Tensor:
    low = _nibbles(data[:, :128].view(-1, 2, 64))  # (B, 2, 128): of each half, four rows of 32
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device)[None, None, :, None]
    high = ((data[:, 128:192].view(-1, 2, 1, 32) >> places) & 3).flatten(2)
    values = (low | (high << 4)).float().view(-1, 16, 16).sub_(32)
    scales = data[:, 192:208].view(torch.int8).float() * _half(data[:, 208:210])
    return values.mul_(scales[:, :, None]).flatten(1)


LAYOUTS = {
    "Q4_0": Layout(32, 18, _q4_0),
    "Q4_1": Layout(32, 20, _q4_1),
    "Q5_0": Layout(32, 22, _q5_0),
    "Q5_1": Layout(32, 24, _q5_1),
    "Q8_0": Layout(32, 34, _q8_0),
    "Q4_K": Layout(256, 144, _q4_k),
    "Q5_K": Layout(256, 176, _q5_k),
    "Q6_K": Layout(256, 210, _q6_k),
}
"""By the names that the `gguf` package has for them."""
