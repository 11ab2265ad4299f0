"""What all layers need of a stream, made once for each forward pass: rotary tables, and attention by sliding window.

A layer calls `attention(layer, q, k, v)`. One kind is for streams of whole sequences, the other for one token a slot.
Letters: T tokens of the stream, S slots, H query heads, K key-value heads, h head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rope import apply_rope, rotate_wide, whole_head
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

    def __init__(self, config: ModelConfig, impl: str, cache: SlotCache) -> None:
        self.impl, self.counts = impl, (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.attention_of_one: dict[Layer, Callable[[Tensor], Tensor]] = {}
        """(S, H h) of queries, keys and values as the product gives them, one (S, H + 2 K, h)."""
        tables = {rope: self._tables(rope, config, cache) for rope in {layer.rope for layer in config.layers}}
        attend = {window: cache.attend(window) for window in {layer.window for layer in config.layers}}
        for layer in set(config.layers):
            self.attention_of_one[layer] = self._of_one(layer.rope, tables[layer.rope], attend[layer.window])

    def attention(self, layer: Layer, q_SHh: Tensor, k_SKh: Tensor, v_SKh: Tensor) -> Tensor:
        """(S, H, h), of queries and keys that are not turned yet."""
        return self.attention_of_one[layer](torch.cat((q_SHh, k_SKh, v_SKh), dim=1)).view_as(q_SHh)

    def _of_one(
        self, rope: Rope | None, tables: tuple[Tensor, Tensor], attend: Callable[[Tensor, Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """Turn, and attend."""
        heads, (cos, sin) = self.counts[0], tables

        def attention_of_one(x_SCh: Tensor) -> Tensor:
            wide_SCh = rotate_wide(x_SCh, cos, sin)
            return attend(wide_SCh[:, :heads].to(x_SCh.dtype), wide_SCh[:, heads:].to(x_SCh.dtype))

        def in_halves(x_SCh: Tensor) -> Tensor:
            *turned, v_SKh = x_SCh.split(self.counts, dim=1)
            return attention_of_one(torch.cat([*map(rope.halves, turned), v_SKh], dim=1))

        whole = rope is None or (rope.dims == cos.shape[-1] and not rope.interleaved)  # `halves` leaves it as it is
        return attention_of_one if whole else in_halves

    def _tables(self, rope: Rope | None, config: ModelConfig, cache: SlotCache) -> tuple[Tensor, Tensor]:
        """(S, H + 2 K, h): queries are scaled, and turned as keys are; values stay as they are."""
        device, lengths = cache.device, cache.lengths.to(cache.device)
        if cache.beyond.any():
            cos, sin = _turns(rope, lengths, config.head_dim, cache.beyond.to(device))
        else:
            if rope not in cache.turns:
                cache.turns[rope] = _turns(rope, torch.arange(cache.capacity, device=device), config.head_dim)
            cos, sin = (values[lengths] for values in cache.turns[rope])
        heads, kv_heads, _ = self.counts
        factor = [config.attention_scale] * heads + [1.0] * kv_heads + [0.0] * kv_heads
        factor_C1 = torch.tensor(factor, device=device)[:, None]
        still_C1 = torch.tensor([0.0] * (heads + kv_heads) + [1.0] * kv_heads, device=device)[:, None]
        return torch.addcmul(still_C1, cos[:, None], factor_C1), sin[:, None] * factor_C1


def _turns(rope: Rope | None, positions: Tensor, head_dim: int, beyond: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (P, h), of positions (P,), as `rotate_wide` takes them; without a rotary embedding, of 0."""
    if rope is not None:
        return whole_head(*rope.tables(positions, head_dim, beyond=beyond))
    still = torch.zeros(len(positions), head_dim, device=positions.device)
    return still + 1, still


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
