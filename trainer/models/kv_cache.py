"""Keys and values of sequences that go on token by token: collected from a stream of prompts, kept in slots.

`model(stream, output="next", cache=PromptCache())` runs prompts as any stream and remembers their keys and values;
`SlotCache.put` copies them into a slot, any number of times: a prompt is computed once for all its samples. A stream of
one token a slot with `cache=SlotCache` then attends to what the slots hold. Not here: choosing tokens (eval.generate).

Letters: S slots, P tokens of a prompt, L tokens of the fullest slot, H query heads, K key-value heads, R = H / K,
h head width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.models.config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

STEP = 32
"""Lengths that products see are rounded up to a multiple, so that they come in few shapes (see SHAPE_STEP)."""
GROWTH = 1.5
"""Room is made for so many times what is needed."""
SMALL = 1 << 24
"""Multiplications of one layer's attention below which one thread is faster than two: 171 against 386 us for 16 slots
of 128 tokens, 9 heads of 64, bfloat16 on two cores of a Zen 4 processor, with threads that sleep while they wait."""


class PromptCache:
    """Remembers keys and values, rotated as attention gets them, of a stream's tokens, layer by layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def attend(self, inner: Attend) -> Attend:
        def remember(q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor) -> Tensor:
            self.layers.append((k_TKh, v_TKh))
            return inner(q_THh, k_TKh, v_TKh)

        return remember

    def cut(self, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Of the stream's tokens [start, stop): (K, P, h) keys and values of each layer, copies."""
        return [
            tuple(x[start:stop].transpose(0, 1).contiguous() for x in pair)  # type: ignore[misc]
            for pair in self.layers
        ]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many of the CPU's threads meanwhile."""
    before = torch.get_num_threads()
    if number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SlotCache:
    """S sequences side by side. lengths (S,) int64: tokens each slot holds; 0: it is free.

    keys (S, K, h, room) and values (S, K, room, h) of each layer, two views of one buffer, so that a token is added to
    both at once; the products over either run along memory, which is twice as fast for keys in bfloat16 on a CPU.
    """

    def __init__(self, config: ModelConfig, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.softcap = config.attention_softcap
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self.beyond = torch.zeros(slots, dtype=torch.bool)
        """Slots whose sequences take the frequencies of longer sequences (trainer.models.rope)."""
        self.capacity = 0
        self.layers = [_Layer(config, slots, 0, dtype, device) for _ in range(config.num_layers)]
        self._next_layer = 0

    @property
    def slots(self) -> int:
        return len(self.lengths)

    def put(self, slot: int, prompt: Sequence[tuple[Tensor, Tensor]], *, beyond: bool = False) -> None:
        """Begin slot `slot` with a prompt's keys and values."""
        length = prompt[0][0].shape[1]
        self._make_room(length + 1)
        for layer, (own_keys, own_values) in zip(self.layers, prompt, strict=True):
            layer.keys[slot, :, :, :length] = own_keys.transpose(1, 2)
            layer.values[slot, :, :length] = own_values
        self.lengths[slot], self.beyond[slot] = length, beyond

    def free(self, slot: int) -> None:
        self.lengths[slot], self.beyond[slot] = 0, False

    def keep(self, slots: Sequence[int]) -> None:
        """Leave out all slots but these, which become 0, 1, 2, ..."""
        index = torch.tensor(slots, dtype=torch.int64)
        self.lengths, self.beyond = self.lengths[index], self.beyond[index]
        self._rebuild(self.capacity, index.to(self.device))

    def begin(self) -> None:
        """Before each forward pass of one token a slot: make room for it and say what each row may see."""
        self._make_room(int(self.lengths.max()) + 1)
        self._next_layer = 0

    def advance(self) -> None:
        """After it: every slot in use has one token more."""
        self.lengths += self.lengths > 0

    def attend(self, window: int | None) -> Callable[[Tensor], Tensor]:
        """Attention of one token a slot over what the slot holds and itself; its key and value are kept. The function
        takes queries, keys and values as one (S, H + 2 K, h) and gives (S, H, h)."""
        lengths = self.lengths.to(self.device)
        used = min(-(-(int(self.lengths.max()) + 1) // STEP) * STEP, self.capacity)
        places = torch.arange(used, device=self.device)
        hidden = places > lengths[:, None]
        if window is not None:
            hidden |= places <= lengths[:, None] - window
        mask = torch.zeros(self.slots, 1, 1, used, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(hidden[:, None, None], float("-inf"))
        heads, kv_heads, width = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        index = _token_places(lengths, kv_heads, width, self.capacity)
        multiplications = 2 * self.slots * heads * width * used
        threads = 1 if multiplications < SMALL else torch.get_num_threads()

        def one_token(x_SCh: Tensor) -> Tensor:
            layer = self.layers[self._next_layer]
            self._next_layer += 1
            layer.buffer.index_copy_(0, index, x_SCh[:, heads:].reshape(-1))
            q_BRh = x_SCh[:, :heads].reshape(self.slots * kv_heads, -1, width)
            with _threads(threads):
                scores = torch.bmm(q_BRh, layer.keys.flatten(0, 1)[:, :, :used])
                if self.softcap is not None:
                    scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
                scores.view(self.slots, -1, *scores.shape[1:]).add_(mask)
                out = torch.bmm(torch.softmax(scores, dim=-1, out=scores), layer.values.flatten(0, 1)[:, :used])
            return out.view(self.slots, heads, width)

        return one_token

    def _make_room(self, length: int) -> None:
        """At least `length` tokens a slot; what is there is copied."""
        if length > self.capacity:
            self._rebuild(-(-int(length * GROWTH) // STEP) * STEP, None)

    def _rebuild(self, capacity: int, slots: Tensor | None) -> None:
        """New buffers of this room, with what the old ones hold of these slots (None: of all)."""
        common = min(self.capacity, capacity)
        for place, old in enumerate(self.layers):
            layer = _Layer(self.config, self.slots, capacity, self.dtype, self.device)
            keys, values = (x if slots is None else x.index_select(0, slots) for x in (old.keys, old.values))
            layer.keys[..., :common], layer.values[:, :, :common] = keys[..., :common], values[:, :, :common]
            self.layers[place] = layer
        self.capacity = capacity


class _Layer:
    """One layer's keys (S, K, h, room) and values (S, K, room, h), and the buffer that both lie in, keys first."""

    def __init__(self, config: ModelConfig, slots: int, room: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, width = config.num_kv_heads, config.head_dim
        # zeros: a hidden place is still multiplied, by 0, and 0 times what malloc gives may be nan
        self.buffer = torch.zeros(2 * slots * heads * width * room, dtype=dtype, device=device)
        keys, values = self.buffer.chunk(2) if room else (self.buffer, self.buffer)
        self.keys = keys.view(slots, heads, width, room)
        self.values = values.view(slots, heads, room, width)


def _token_places(lengths: Tensor, heads: int, width: int, room: int) -> Tensor:
    """(S 2K h,) where in a layer's buffer the next token's keys and values go, in the order of (S, 2K, h)."""
    slots = len(lengths)
    slot, head, place = (torch.arange(size, device=lengths.device) for size in (slots, heads, width))
    row = (slot[:, None, None] * heads + head[:, None]) * width * room
    keys = row + place * room + lengths[:, None, None]
    values = slots * heads * width * room + row + lengths[:, None, None] * width + place
    return torch.cat((keys, values), dim=1).flatten()
