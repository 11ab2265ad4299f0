"""Keys and values of sequences that go on token by token: collected from a stream of prompts, kept in slots.

`model(stream, output="next", cache=PromptCache())` runs prompts as any stream and remembers their keys and values;
`SlotCache.put` copies them into a slot, any number of times: a prompt is computed once for all its samples. A stream of
one token a slot with `cache=SlotCache` then attends to what the slots hold. Not here: choosing tokens (eval.generate).

Letters: S slots, P tokens of a prompt, L tokens of the fullest slot, H query heads, K key-value heads, R = H / K,
h head width.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.models.config import ModelConfig
from trainer.models.rope import Rope

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

STEP = 32
"""Room is a multiple of it, so that products come in few shapes (see SHAPE_STEP)."""
SPARE = 8
"""Room is made for one in so many tokens more than needed: all of it is multiplied, and growing copies it."""
SMALL = 1 << 24
"""Multiplications of one layer's attention below which one thread is faster than two: 171 against 386 us for 16 slots
of 128 tokens, 9 heads of 64, bfloat16 on two cores of a Zen 4 processor, with threads that sleep while they wait."""


class PromptCache:
    """Remembers keys and values, rotated as attention gets them, of a stream's tokens, layer by layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def attend(self, inner: Attend) -> Attend:
        def remember(q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor) -> Tensor:
            self.layers.append((k_TKh.contiguous(), v_TKh.contiguous()))  # a view would keep all of a product
            return inner(q_THh, k_TKh, v_TKh)

        return remember

    def rows(self, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the stream's tokens at places (P,): (K, P, h) keys and values, layer by layer, copies."""
        places = places.to(self.layers[0][0].device)
        for keys, values in self.layers:
            yield keys.index_select(0, places).transpose(0, 1), values.index_select(0, places).transpose(0, 1)


@contextmanager
def _threads(number: int, before: int) -> Iterator[None]:
    """So many of the CPU's threads meanwhile, where there are `before` now."""
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SlotCache:
    """S sequences side by side. lengths (S,) int64: tokens each slot holds; 0: it is free.

    A layer's buffer (2, S, K, room, h) has keys first, then values, so that a token is added to both at once. Products
    go over all the room, hidden places masked: of a part of it, the CPU library would make a copy first.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        most_tokens: int = sys.maxsize,
    ) -> None:
        """most_tokens: more than that no slot will ever hold."""
        self.config, self.device, self.dtype, self.most_tokens = config, device, dtype, most_tokens
        self.softcap = config.attention_softcap
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self.beyond = torch.zeros(slots, dtype=torch.bool)
        """Slots whose sequences take the frequencies of longer sequences (trainer.models.rope)."""
        self.capacity = 0
        self.layers = [self._buffer(0) for _ in range(config.num_layers)]
        self.views: list[tuple[Tensor, Tensor, Tensor]] = []
        """Of each layer, as products take them: rows of h, keys (S K, h, room), values (S K, room, h)."""
        self.turns: dict[Rope | None, tuple[Tensor, Tensor]] = {}
        """Cosines and sines of all places, as far as they were needed (trainer.models.shared_by_layers)."""
        self.first_rows = torch.zeros(slots, 0, dtype=torch.int64)
        """(S, 2K) which rows of h in a layer's buffer a slot's first token's keys and values are."""
        self._next_layer = 0

    @property
    def slots(self) -> int:
        return len(self.lengths)

    def put(self, slot: int, cache: PromptCache, places: Tensor, *, beyond: bool = False) -> None:
        """Begin slot `slot` with a prompt's keys and values: those of the cache's stream at places (P,)."""
        length = len(places)
        self.make_room(length + 1)
        for layer, (own_keys, own_values) in zip(self.layers, cache.rows(places), strict=True):
            layer[0, slot, :, :length], layer[1, slot, :, :length] = own_keys, own_values
        self.lengths[slot], self.beyond[slot] = length, beyond

    def free(self, slot: int) -> None:
        self.lengths[slot], self.beyond[slot] = 0, False

    def keep(self, slots: Sequence[int]) -> None:
        """Leave out all slots but these, which become 0, 1, 2, ..."""
        index = torch.tensor(slots, dtype=torch.int64)
        self.lengths, self.beyond = self.lengths[index], self.beyond[index]
        self._rebuild(self.capacity, index.to(self.device))

    def begin(self) -> None:
        """Before each forward pass of one token a slot: make room for it, and give back what is far too much."""
        needed = int(self.lengths.max()) + 1
        if not needed <= self.capacity <= 2 * needed + STEP:
            self._rebuild(self._room(needed), None)
        self._next_layer = 0

    def advance(self) -> None:
        """After it: every slot in use has one token more."""
        self.lengths += self.lengths > 0

    def attend(self, window: int | None) -> Callable[[Tensor, Tensor], Tensor]:
        """Attention of one token a slot over what the slot holds and itself; its key and value are kept. The function
        takes queries (S, H, h) and keys and values as one (S, 2 K, h), and gives (S, H h)."""
        heads, kv_heads, width = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        lengths = self.lengths.to(self.device)
        rows = (self.first_rows + lengths[:, None]).flatten()
        place, last = torch.arange(self.capacity, device=self.device), lengths[:, None].expand(-1, kv_heads)
        last = last.reshape(-1, 1, 1)
        hidden = place > last if window is None else (place > last) | (place <= last - window)
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        threads, few = torch.get_num_threads(), 2 * self.slots * heads * width * self.capacity < SMALL
        grouped, joined = (self.slots * kv_heads, heads // kv_heads, width), (self.slots, heads * width)

        def one_token(q_SHh: Tensor, kv_SCh: Tensor) -> Tensor:
            by_row, keys, values = self.views[self._next_layer]
            self._next_layer += 1
            by_row.index_copy_(0, rows, kv_SCh.reshape(-1, width))
            scores = torch.bmm(q_SHh.reshape(grouped), keys)
            if self.softcap is not None:
                scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
            return torch.bmm(torch.softmax(scores.add_(mask), dim=-1, out=scores), values).view(joined)

        def on_one_thread(q_SHh: Tensor, kv_SCh: Tensor) -> Tensor:
            with _threads(1, threads):
                return one_token(q_SHh, kv_SCh)

        return on_one_thread if few and threads > 1 else one_token

    def make_room(self, length: int) -> None:
        """For slots of `length` tokens."""
        if length > self.capacity:
            self._rebuild(self._room(length), None)

    def _room(self, length: int) -> int:
        room = min(length + length // SPARE, max(length, self.most_tokens))
        return -(-room // STEP) * STEP

    def _rebuild(self, capacity: int, slots: Tensor | None) -> None:
        """New buffers of this room, with what the old ones hold of these slots (None: of all)."""
        common = min(self.capacity, capacity)
        self.views = []  # so that each old buffer goes when its new one is there
        for place, old in enumerate(self.layers):
            self.layers[place] = self._buffer(capacity)
            kept = old if slots is None else old.index_select(1, slots)
            self.layers[place][..., :common, :] = kept[..., :common, :]
            self.layers[place][..., common:, :] = 0  # hidden, and still multiplied: 0 times what is there may be nan
        self.capacity, width = capacity, self.config.head_dim
        by_kind = [layer.view(2, -1, capacity, width) for layer in self.layers]
        self.views = [(both.view(-1, width), both[0].transpose(1, 2), both[1]) for both in by_kind]
        self.turns = {}
        heads = torch.arange(2 * self.slots * self.config.num_kv_heads, device=self.device) * capacity
        self.first_rows = heads.view(2, self.slots, -1).transpose(0, 1).flatten(1)

    def _buffer(self, capacity: int) -> Tensor:
        shape = 2, self.slots, self.config.num_kv_heads, capacity, self.config.head_dim
        return torch.empty(shape, dtype=self.dtype, device=self.device)
