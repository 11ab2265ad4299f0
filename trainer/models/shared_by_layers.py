"""What all layers need of a stream, made once for each forward pass: rotary tables, and attention by sliding window.

A layer calls `attention(layer, q, k, v)`. One kind is for streams of whole sequences, the other for one token a slot.
Letters: T tokens of the stream, S slots, H query heads, K key-value heads, h head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rope import apply_rope, rotate_whole, whole_head
from trainer.batch import Stream
from trainer.models.attention_form import stream_attend
from trainer.models.config import ModelConfig
from trainer.models.families import Layer
from trainer.models.kv_cache import PromptCache, SlotCache
from trainer.models.rope import Rope

SHAPE_STEP = 32
"""Tokens and scored tokens are padded to a multiple of this, so that products have few different shapes: the CPU
library builds a program for each shape, which takes milliseconds and about 1 MB. No token sees a padded one."""


class RopeTables(NamedTuple):
    """(T, h / 2) float32. The queries' tables carry the scale of attention, which so costs neither a pass nor a
    rounding."""

    cos: Tensor
    sin: Tensor
    scaled_cos: Tensor
    scaled_sin: Tensor


class SharedByLayers:
    """What layers need of the stream: rotary tables by kind of rotary embedding, attention by sliding window."""

    def __init__(
        self,
        stream: Stream,
        config: ModelConfig,
        impl: str,
        attention: str,
        dtype: torch.dtype,
        cache: PromptCache | None = None,
    ) -> None:
        self.impl, self.scale = impl, config.attention_scale
        positions = padded(stream.positions)
        self.tables: dict[Rope | None, RopeTables | None] = {None: None}
        self.attend: dict[int | None, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
        for layer in config.layers:
            if layer.rope not in self.tables:
                beyond = None
                if layer.rope.by_length:
                    beyond = _beyond_original(layer.rope, stream, len(positions)).to(positions.device)
                cos, sin = layer.rope.tables(positions, config.head_dim, beyond=beyond)
                self.tables[layer.rope] = RopeTables(cos, sin, cos * self.scale, sin * self.scale)
            if layer.window not in self.attend:
                own = stream_attend(attention, stream, len(positions), config, dtype, window=layer.window)
                self.attend[layer.window] = own if cache is None else cache.attend(own)

    def attention(self, layer: Layer, q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor) -> Tensor:
        """(T, H, h), of queries and keys that are not turned yet."""
        tables, rope = self.tables[layer.rope], layer.rope
        if rope is None or tables is None:
            q_THh = q_THh * self.scale
        else:
            q_THh = apply_rope(rope.halves(q_THh), tables.scaled_cos, tables.scaled_sin, impl=self.impl)
            k_TKh = apply_rope(rope.halves(k_TKh), tables.cos, tables.sin, impl=self.impl)
        return self.attend[layer.window](q_THh, k_TKh, v_TKh)


class SharedByLayersOfSlots:
    """The same for one token a slot. How many operations there are is what takes time then: queries, keys and values
    are turned as one (values by nothing), by tables (S, H + 2 K, h) that are made once for all layers."""

    def __init__(self, stream: Stream, config: ModelConfig, impl: str, cache: SlotCache) -> None:
        self.impl, self.counts = impl, (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.tables: dict[Rope | None, tuple[Tensor, Tensor]] = {}
        self.attend: dict[int | None, Callable[[Tensor], Tensor]] = {}
        for layer in config.layers:
            if layer.rope not in self.tables:
                self.tables[layer.rope] = self._tables(layer.rope, stream.positions, config, cache)
            if layer.window not in self.attend:
                self.attend[layer.window] = cache.attend(layer.window)

    def _tables(
        self, rope: Rope | None, positions: Tensor, config: ModelConfig, cache: SlotCache
    ) -> tuple[Tensor, Tensor]:
        one = torch.ones(len(positions), config.head_dim // 2, device=positions.device)
        still = one, torch.zeros_like(one)
        cos, sin = (
            still if rope is None else rope.tables(positions, config.head_dim, beyond=cache.beyond.to(one.device))
        )
        scale = config.attention_scale
        by_kind = (cos * scale, sin * scale), (cos, sin), still
        cos, sin = (
            torch.cat(
                [half[:, None].expand(-1, count, -1) for half, count in zip(own, self.counts, strict=True)], dim=1
            )
            for own in zip(*by_kind, strict=True)
        )
        return whole_head(cos, sin)

    def attention(self, layer: Layer, q_SHh: Tensor, k_SKh: Tensor, v_SKh: Tensor) -> Tensor:
        """(S, H, h), of queries and keys that are not turned yet."""
        if layer.rope is not None:
            q_SHh, k_SKh = layer.rope.halves(q_SHh), layer.rope.halves(k_SKh)
        return self._attend(layer, torch.cat((q_SHh, k_SKh, v_SKh), dim=1))

    def attention_of_one(self, layer: Layer, x_SCh: Tensor) -> Tensor:
        """The same of queries, keys and values (S, H + 2 K, h) that are one tensor already."""
        rope = layer.rope
        if rope is None or (rope.dims == x_SCh.shape[-1] and not rope.interleaved):  # `halves` leaves it as it is
            return self._attend(layer, x_SCh)
        return self.attention(layer, *x_SCh.split(self.counts, dim=1))

    def _attend(self, layer: Layer, x_SCh: Tensor) -> Tensor:
        return self.attend[layer.window](rotate_whole(x_SCh, *self.tables[layer.rope]))


Shared = SharedByLayers | SharedByLayersOfSlots


def _beyond_original(rope: Rope, stream: Stream, num_tokens: int) -> Tensor:
    """(T,) bool: tokens of groups that are longer than what the model was first trained on. Raises ModelError."""
    found = torch.zeros(num_tokens, dtype=torch.bool)
    for group in stream.layout:
        found[group.start : group.stop] = rope.is_beyond(group.lengths)
    return found


def padded(values: Tensor) -> Tensor:
    """(n,) int64 with zeros behind it up to a multiple of SHAPE_STEP."""
    return F.pad(values, (0, -len(values) % SHAPE_STEP))
