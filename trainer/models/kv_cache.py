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
import torch.nn.functional as F
from torch import Tensor

from trainer.models.config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

STEP = 32
"""Lengths that products see are rounded up to a multiple, so that they come in few shapes (decoder.SHAPE_STEP)."""
GROWTH = 1.5
"""Room is made for so many times what is needed."""
SMALL = 1 << 24
"""Multiplications of one layer's attention below which one thread is faster than two: 171 against 386 us for 16 slots
of 128 tokens, 9 heads of 64, bfloat16 on two cores of a Zen 4 processor, with threads that sleep while they wait."""


class PromptCache:
    """Remembers keys and values, rotated as attention gets them, of a stream's tokens, layer by layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def attend(self, window: int | None, inner: Attend) -> Attend:
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

    layers: keys (S, K, h, room) and values (S, K, room, h); the products over either run along memory then, which is
    twice as fast for keys in bfloat16 on a CPU.
    """

    def __init__(self, config: ModelConfig, slots: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.device = config, device
        self.softcap = config.attention_softcap
        keys, values = (
            (slots, config.num_kv_heads, config.head_dim, 0),
            (slots, config.num_kv_heads, 0, config.head_dim),
        )
        self.layers = [
            tuple(torch.empty(shape, dtype=dtype, device=device) for shape in (keys, values))
            for _ in range(config.num_layers)
        ]
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self.beyond = torch.zeros(slots, dtype=torch.bool)
        """Slots whose sequences take the frequencies of longer sequences (trainer.models.rope)."""
        self._next_layer = 0

    @property
    def slots(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self.layers[0][1].shape[2]

    def put(self, slot: int, prompt: Sequence[tuple[Tensor, Tensor]], *, beyond: bool = False) -> None:
        """Begin slot `slot` with a prompt's keys and values."""
        length = prompt[0][0].shape[1]
        self._make_room(length + 1)
        for (keys, values), (own_keys, own_values) in zip(self.layers, prompt, strict=True):
            keys[slot, :, :, :length] = own_keys.transpose(1, 2)
            values[slot, :, :length] = own_values
        self.lengths[slot], self.beyond[slot] = length, beyond

    def free(self, slot: int) -> None:
        self.lengths[slot], self.beyond[slot] = 0, False

    def keep(self, slots: Sequence[int]) -> None:
        """Leave out all slots but these, which become 0, 1, 2, ..."""
        index = torch.tensor(slots, dtype=torch.int64)
        self.lengths, self.beyond = self.lengths[index], self.beyond[index]
        index = index.to(self.device)
        self.layers = [tuple(x.index_select(0, index) for x in pair) for pair in self.layers]

    def begin(self) -> None:
        """Before each forward pass of one token a slot: make room for it and say what each row may see."""
        longest = int(self.lengths.max())
        self._make_room(longest + 1)
        self._next_layer = 0

    def advance(self) -> None:
        """After it: every slot in use has one token more."""
        self.lengths += self.lengths > 0

    def attend(self, window: int | None, inner: Attend | None = None) -> Attend:
        """Attention of one token a slot over what the slot holds and itself; its key and value are kept."""
        lengths = self.lengths.to(self.device)
        used = min(-(-(int(self.lengths.max()) + 1) // STEP) * STEP, self.capacity)
        places = torch.arange(used, device=self.device)
        hidden = places > lengths[:, None]
        if window is not None:
            hidden |= places <= lengths[:, None] - window
        dtype = self.layers[0][0].dtype
        mask = torch.zeros(self.slots, 1, 1, used, dtype=dtype, device=self.device)
        mask = mask.masked_fill_(hidden[:, None, None], float("-inf"))
        threads, (_, heads, width, room) = torch.get_num_threads(), self.layers[0][0].shape
        rows = torch.arange(self.slots * heads, device=self.device)
        value_rows = rows * room + lengths.repeat_interleave(heads)
        columns = torch.arange(self.slots * heads * width, device=self.device)
        key_places = columns * room + lengths.repeat_interleave(heads * width)

        def one_token(q_SHh: Tensor, k_SKh: Tensor, v_SKh: Tensor) -> Tensor:
            keys, values = self.layers[self._next_layer]
            self._next_layer += 1
            keys.view(-1).index_copy_(0, key_places, k_SKh.reshape(-1))
            values.view(-1, width).index_copy_(0, value_rows, v_SKh.reshape(-1, width))
            q_BRh = q_SHh.reshape(keys.shape[0] * keys.shape[1], -1, q_SHh.shape[-1])
            with _threads(1 if 2 * q_SHh.numel() * used < SMALL else threads):
                scores = torch.bmm(q_BRh, keys.flatten(0, 1)[:, :, :used])
                if self.softcap is not None:
                    scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
                scores.view(self.slots, -1, *scores.shape[1:]).add_(mask)
                out = torch.bmm(torch.softmax(scores, dim=-1, out=scores), values.flatten(0, 1)[:, :used])
            return out.view(q_SHh.shape)

        return one_token

    def _make_room(self, length: int) -> None:
        """At least `length` tokens a slot; what is there is copied."""
        if length <= self.capacity:
            return
        more = -(-int(length * GROWTH) // STEP) * STEP - self.capacity
        self.layers = [(F.pad(keys, (0, more)), F.pad(values, (0, 0, 0, more))) for keys, values in self.layers]
