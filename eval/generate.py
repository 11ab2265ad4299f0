"""Draw completions from a model on this machine: many at a time, each prompt computed once, finished slots refilled.

A sample depends on the seed, its prompt's id and its own number only, not on what is drawn beside it (but for rounding:
products of other shapes may round a logit otherwise). Prompts are run as a stream, like in training; then each slot
goes on by one token at a time over keys and values that are kept. Prompts and samples as files: eval.sample.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from data_tools.errors import UserError
from data_tools.tokenizer import Tokenizer
from eval.generate_workers import in_processes
from eval.prefill import Prefilled, how_many_fit, prefill, shares
from eval.sampling import SamplingOptions, next_tokens, penalised, uniform_numbers
from trainer.batch import Stream
from trainer.models.decoder import Decoder
from trainer.models.kv_cache import SlotCache

LEAST_SLOTS = 8
"""A worker with fewer would read the weights for too few rows at a time."""
TAIL = 8
"""A stop text is looked for in so many tokens more than it has characters, from the end."""


@dataclass(frozen=True)
class Request:
    """A prompt's tokens, BOS and generation prompt included, and the name that its random numbers come from.

    prefix: how many of them, at the end, are the beginning of the answer; a completion's text is what follows it.
    """

    id: str
    prompt_ids: tuple[int, ...]
    prefix: int = 0


Todo = tuple[Request, Sequence[int]]
"""A prompt, and the numbers of the samples wanted of it."""


@dataclass(frozen=True)
class Completion:
    """One finished sample. token_ids: all that were drawn, the token that ended it included; text: without it and
    without a stop text. logps: nats of each token under the model, before temperature and penalty."""

    request_id: str
    sample: int
    token_ids: list[int]
    logps: list[float]
    text: str
    finish_reason: str
    """stop | length"""
    prompt_tokens: int


@dataclass
class _Running:
    """A sample that a slot is busy with."""

    request: Request
    sample: int
    uniforms: np.random.Generator
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


@dataclass
class _Waiting:
    """A prompt that was run, with samples of it still to begin."""

    request: Request
    prompt: Prefilled
    samples: deque[int]


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    options: SamplingOptions,
    *,
    stop_ids: Sequence[int] = (),
    slots: int = 16,
    prefill_tokens: int = 2048,
    samples: Sequence[Sequence[int]] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    workers: int | None = None,
) -> Iterator[Completion]:
    """Completions as they finish, in no fixed order.

    stop_ids: tokens that end a completion (see `end_tokens`), beside `options.stop_ids`. slots: sequences at a time.
    prefill_tokens: how many tokens of prompts are run at once; a longer prompt is run alone. samples: which samples of
    each request are wanted (default: 0 to options.n - 1). stopped: asked between tokens, true ends it all. workers:
    processes that share the slots (default: what `default_workers` says). Raises UserError for a prompt that nothing
    can be drawn after.
    """
    wanted = [list(range(options.n)) for _ in requests] if samples is None else [list(own) for own in samples]
    _check(model, requests, options)
    todo = [(request, own) for request, own in zip(requests, wanted, strict=True) if own]
    workers = default_workers(model, slots) if workers is None else workers
    slots = min(slots, sum(len(own) for _, own in todo))
    workers = max(1, min(workers, slots))

    def work(own: Sequence[Todo], ended: Callable[[], bool]) -> Iterator[Completion]:
        engine = _Engine(model, tokenizer, options, stop_ids, -(-slots // workers), prefill_tokens)
        with torch.inference_mode():
            yield from engine.run(own, ended)

    if workers == 1:
        yield from work(todo, stopped)
        return
    if len(todo) < workers:  # each of them begins with a part of every prompt's samples
        todo = [(request, own[part::workers]) for request, own in todo for part in range(workers)]
    # dealt out, not taken by who is free: then a run draws the same samples again, to the last bit
    yield from in_processes([partial(work, hand) for hand in dealt(todo, workers)], stopped)


def dealt(todo: Sequence[Todo], hands: int) -> list[list[Todo]]:
    """As many to each hand as to the others, in order, with about as many tokens: of each round, the longest prompt
    goes where fewest tokens are."""
    found: list[list[Todo]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for start in range(0, len(todo), hands):
        longest_first = sorted(todo[start : start + hands], key=lambda each: -len(each[0].prompt_ids))
        for each, hand in zip(longest_first, sorted(range(hands), key=tokens.__getitem__), strict=False):
            found[hand].append(each)
            tokens[hand] += len(each[0].prompt_ids)
    return found


def default_workers(model: Decoder, slots: int) -> int:
    """As many as there are threads, where each gets at least `LEAST_SLOTS` slots; else 1, with all threads.

    One token a slot is many small operations, which two threads of one process hardly speed up: 16 prompts of about 100
    tokens and 128 tokens behind each, SmolLM2-135M in bfloat16 on two cores of a Zen 4 processor, took 7.3 to 8.7 s in
    one process (6.1 to 6.3 with threads that spin) and 5.7 to 5.8 s in two. With only one core free, two take longer.
    """
    threads = torch.get_num_threads()
    on_cpu = model.head_weight.device.type == "cpu" and sys.platform == "linux"
    return threads if on_cpu and slots >= LEAST_SLOTS * threads else 1


def end_tokens(tokenizer: Tokenizer, *configs: dict) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's EOS and the `eos_token_id` of config.json and generation_config.json."""
    found = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for config in configs:
        value = config.get("eos_token_id")
        found += [value] if isinstance(value, int) else value or []
    return tuple(dict.fromkeys(found))


def _check(model: Decoder, requests: Sequence[Request], options: SamplingOptions) -> None:
    by_length = [layer.rope for layer in model.config.layers if layer.rope is not None and layer.rope.by_length]
    for request in requests:
        if not request.prompt_ids:
            raise UserError(f"prompt '{request.id}': has no tokens, so nothing can be drawn after it; write something")
        for rope in by_length[:1]:
            original, length = rope.scaling.original_max_position_embeddings, len(request.prompt_ids)
            kept = length > original and rope.scaling.kind == "longrope"
            if not kept and length + options.max_tokens > original:
                passed = f"{length} tokens and max_tokens {options.max_tokens} pass {original}"
                problem = f"{passed}, where the model's {rope.scaling.kind} RoPE changes; lower max_tokens"
                raise UserError(f"prompt '{request.id}': {problem}")


class _Engine:
    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        options: SamplingOptions,
        stop_ids: Sequence[int],
        slots: int,
        prefill_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.stop_ids = {*stop_ids, *options.stop_ids}
        self.prefill_tokens, self.most_slots = prefill_tokens, slots
        self.device, self.dtype = model.head_weight.device, model.head_weight.dtype
        self.waiting: deque[_Waiting] = deque()
        self.running: list[_Running | None] = []
        self.tokens: Tensor
        self.seen: Tensor | None = None

    def run(self, requests: Sequence[Todo], stopped: Callable[[], bool]) -> Iterator[Completion]:
        todo = deque((request, deque(own)) for request, own in requests if own)
        if not todo:
            return
        slots = min(self.most_slots, sum(len(own) for _, own in todo))
        longest = max(len(request.prompt_ids) for request, _ in todo) + self.options.max_tokens
        self.cache = SlotCache(self.model.config, slots, dtype=self.dtype, device=self.device, most_tokens=longest)
        self.running, self.tokens = [None] * slots, torch.zeros(slots, dtype=torch.int64)
        if self.options.repetition_penalty != 1:
            self.seen = torch.zeros(slots, self.model.config.vocab_size, dtype=torch.bool)
        while (todo or self.waiting or any(self.running)) and not stopped():
            yield from self._fill(todo)
            if not any(self.running):
                continue
            if not todo and not self.waiting:
                self._narrow()
            yield from self._step()

    def _fill(self, todo: deque) -> Iterator[Completion]:
        """Begin samples in free slots, after running the prompts that they need."""
        free = [slot for slot, own in enumerate(self.running) if own is None]
        while free and (todo or self.waiting):
            if not self.waiting:
                self._run_prompts(todo)
            begun: list[tuple[int, _Waiting]] = []
            while free and self.waiting:
                first = self.waiting[0]
                slot = free.pop(0)
                self.cache.put(slot, first.prompt.cache, first.prompt.places, beyond=first.prompt.beyond)
                sample = first.samples.popleft()
                numbers = uniform_numbers(self.options.seed, first.request.id, sample)
                self.running[slot] = _Running(first.request, sample, numbers)
                if self.seen is not None:
                    self.seen[slot] = False
                    self.seen[slot, torch.tensor(first.request.prompt_ids)] = True
                begun.append((slot, first))
                if not first.samples:
                    self.waiting.popleft()
            logits = torch.stack([waiting.prompt.logits for _, waiting in begun])
            yield from self._take([slot for slot, _ in begun], logits)
            free = [slot for slot, own in enumerate(self.running) if own is None]

    def _run_prompts(self, todo: deque) -> None:
        """The next prompts, as many as make a stream of `prefill_tokens` tokens, from one to as many as there are
        slots: more than are free, so that those that begin alike are run together."""
        next_ones = islice((request.prompt_ids for request, _ in todo), self.most_slots)
        count = how_many_fit(next_ones, self.prefill_tokens, share=shares(self.model))
        chosen = [todo.popleft() for _ in range(count)]
        prompts = prefill(self.model, [request.prompt_ids for request, _ in chosen])
        self.cache.make_room(max(len(prompt.places) for prompt in prompts) + 1)  # once for all of them
        for (request, own), prompt in zip(chosen, prompts, strict=True):
            self.waiting.append(_Waiting(request, prompt, own))

    def _step(self) -> Iterator[Completion]:
        """One token more for every slot in use."""
        self.cache.begin()
        nothing = torch.empty(0, dtype=torch.int64)
        stream = Stream(self.tokens, nothing, nothing, nothing, nothing, nothing, nothing, ())
        logits = self.model(stream.to(self.device), output="next", cache=self.cache).float().cpu()
        self.cache.advance()
        busy = [slot for slot, own in enumerate(self.running) if own is not None]
        yield from self._take(busy, logits if len(busy) == len(logits) else logits[busy])

    def _take(self, slots: list[int], logits: Tensor) -> Iterator[Completion]:
        """Choose a token for each of these slots from its logits; yields the samples that it ends."""
        running = [self.running[slot] for slot in slots]
        judged = logits
        if self.seen is not None:
            judged = penalised(logits, self.seen[slots], self.options.repetition_penalty)
        uniforms = torch.zeros(len(slots), dtype=torch.float64)
        if self.options.temperature > 0:
            uniforms = torch.tensor([own.uniforms.random() for own in running], dtype=torch.float64)
        chosen = next_tokens(judged, self.options, uniforms)
        logps = logits.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)
        if self.seen is not None:
            self.seen[slots, chosen] = True
        self.tokens[slots] = chosen
        for slot, own, token, logp in zip(slots, running, chosen.tolist(), logps.tolist(), strict=True):
            own.ids.append(token)
            own.logps.append(logp)
            done = self._finished(own)
            if done is not None:
                self.running[slot] = None
                self.cache.free(slot)
                self.tokens[slot] = 0
                yield done

    def _finished(self, own: _Running) -> Completion | None:
        reason, text = None, None
        if own.ids[-1] in self.stop_ids:
            reason, text = "stop", self._continuation(own, own.ids[:-1])
        elif self.options.stop and (found := self._stopped_text(own)) is not None:
            reason, text = "stop", found
        elif len(own.ids) == self.options.max_tokens:
            reason, text = "length", self._continuation(own, own.ids)
        if reason is None or text is None:
            return None
        prompt_tokens = len(own.request.prompt_ids)
        return Completion(own.request.id, own.sample, own.ids, own.logps, text, reason, prompt_tokens)

    def _stopped_text(self, own: _Running) -> str | None:
        """The text before the first stop text, or None where there is none."""
        longest = max(map(len, self.options.stop))
        tail = self._text(own.ids[-(longest + TAIL) :])
        if not any(stop in tail for stop in self.options.stop):
            return None
        text = self._continuation(own, own.ids)
        places = [place for stop in self.options.stop if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None

    def _continuation(self, own: _Running, ids: list[int]) -> str:
        """The text of tokens behind the request's prefix: a first space is dropped at the start of a text only."""
        if not own.request.prefix:
            return self._text(ids)
        begun = list(own.request.prompt_ids[-own.request.prefix :])
        return self._text(begun + ids)[len(self._text(begun)) :]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode([token for token in ids if not self.tokenizer.is_special(token)])

    def _narrow(self) -> None:
        """Halve the slots while at most half of them are in use and nothing is left to begin."""
        busy = [slot for slot, own in enumerate(self.running) if own is not None]
        if 2 * len(busy) > len(self.running):
            return
        kept = busy + [slot for slot, own in enumerate(self.running) if own is None]
        kept = kept[: max(1, len(self.running) // 2)]
        self.cache.keep(kept)
        self.running, self.tokens = [self.running[slot] for slot in kept], self.tokens[kept]
        self.seen = None if self.seen is None else self.seen[kept]
