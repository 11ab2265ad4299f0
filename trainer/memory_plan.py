"""How many bytes a training step needs on one rank, from shapes and settings alone: no weights, no forward pass.

What stays (parameters, gradients, optimizer) is counted tensor by tensor; activations are what the autograd Functions
of kernels/ and trainer/models keep of a token; the rest is working memory of the largest moments. A step has three
moments that can be its peak, and `MemoryPlan.peak` is the largest of them: the head's backward (all activations are
there), the backward of the last block (the same, the head's gradient and a block's working memory), and the end of the
backward (all gradients, the embedding's among them). Not counted: Python, torch and a GPU's context.

`trainer.dry_run` finds out what a step works on and prints a plan. tests/test_memory_plan.py compares with measured
bytes. Letters: T tokens and N scored tokens of a micro-batch, D width, F inner width, V vocabulary, H query heads,
K key-value heads, h head width.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from kernels.linear_logps_plan import SLAB
from kernels.vocabulary_slabs import KEPT_SHARE, SLAB_COLUMNS, cut_slabs, make_room
from trainer.config import Config
from trainer.lora_memory import adapter_sizes
from trainer.models.attention import BATCH_SCORES
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder
from trainer.models.shared_by_layers import SHAPE_STEP

FLOAT32 = 4
ROW_OVERHEAD = 250
"""Bytes of a cached reference row besides its numbers: key, array object and place in the dictionary (CPython 3.11)."""
HEAP_HOLES = 0.2
"""On a CPU without sharding, freed buffers stay with the process (trainer.numerics) and not every hole fits what comes
next: this share is added to what is live. Measured with SmolLM2-135M: 0.09 to 0.18 (docs/scaling.md), once 0.37 in
float32 with full activation checkpointing."""
SHARDED_HEAP = 192 << 20
"""With sharding, large buffers are given back; what stays: oneDNN's programs, small buffers, gloo's. Measured too."""


KEPT_STATES = {"pre": 4, "post": 4, "sandwich": 6, "parallel": 2}
"""States of the model's width that a block keeps, by where its norms stand: a norm's input, a product's input."""


@dataclass(frozen=True)
class Work:
    """What a rank works on at a time: the most tokens and scored tokens of a micro-batch, micro-batches of a step, and
    rows and numbers of the reference cache."""

    tokens: int
    scored: int
    micro_batches: int
    reference_rows: int = 0
    reference_numbers: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank. `peak` is not their sum: not all are there at the same moment."""

    parameters: int
    """Masters, or this rank's rows of them, the working copies, and what is frozen."""
    gradients: int
    """The float32 gradients that a step ends with."""
    optimizer: int
    """Both moments of AdamW."""
    activations: int
    """What the forward pass keeps for the backward pass, with one block's worth that is computed again."""
    head: int
    """The head's own states, kept slabs and gradient."""
    gathered: int
    """With sharding: whole weights and whole gradients at the fullest moment."""
    reference: int
    """Cached rows, or the frozen model."""
    snapshot: int
    """The copy that an asynchronous save writes from, in CPU memory."""
    peak: int
    """Most bytes at a time on the device of the model; on a CPU with the snapshot and what the heap adds."""


@cache
def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by name; tied weights once."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(model).named_parameters()}


def num_shards(config: Config, world_size: int) -> int:
    """Ranks that hold one copy of the model between them; 0: the model is not sharded (as `startup.is_sharded`)."""
    strategy = config.dist.strategy
    whole = world_size == 1 or config.model.quantise != "none"
    if strategy == "replicas" or (strategy == "auto" and whole):
        return 0
    return world_size // config.dist.replicas


def kept_per_token(model: ModelConfig, itemsize: int, form: str = "blocks") -> int:
    """Bytes that one block keeps of a token between forward and backward, without activation checkpointing.

    Norms keep their sums (D) and scales; the products their inputs, which are the norms' results (D each) and
    attention's result; attention q, k and v; the MLP gate and up. Products' results that nobody needs again are gone.
    Families differ (`KEPT_STATES`); norms of queries and keys keep their inputs, an MLP without gate its activation.
    """
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    numbers = KEPT_STATES[model.placement] * model.hidden_size + 2 * queries + 2 * keys + 2 * model.intermediate_size
    numbers += queries + keys if model.qk_norm != "none" else 0
    numbers += 2 * model.intermediate_size if model.gated and model.activation == "gelu" else 0
    scales = (KEPT_STATES[model.placement] // 2) * FLOAT32
    if model.qk_norm in ("head", "each"):
        scales += (model.num_heads + model.num_kv_heads) * FLOAT32
    if form == "blocks":
        return numbers * itemsize + scales
    sums = FLOAT32 * model.num_heads  # log-sum-exp
    # flex attention keeps its result heads first, the product behind it a copy, tokens first
    return numbers * itemsize + scales + sums + (queries * itemsize if form == "flex" else 0)


def recomputed_per_token(model: ModelConfig, itemsize: int, how: str) -> int:
    """What is left of that with `train.activation_checkpointing` full (a block's input) or selective (also q, k, v and
    what attention and the MLP add)."""
    numbers = model.hidden_size
    if how == "selective":
        numbers += (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + 2 * model.hidden_size
    return numbers * itemsize


def activation_bytes(model: ModelConfig, tokens: int, *, itemsize: int, how: str, form: str = "blocks") -> int:
    """What all blocks keep of a micro-batch of `tokens`; how: train.activation_checkpointing."""
    kept = kept_per_token(model, itemsize, form)
    again = recomputed_per_token(model, itemsize, how)
    every = 0 if how == "none" else int(how[6:]) if how.startswith("every_") else 1
    count = len(range(0, model.num_layers, every)) if every else 0
    return _padded(tokens) * (count * again + (model.num_layers - count) * kept)


def head_kept_bytes(model: ModelConfig, scored: int, *, itemsize: int, stash: bool, triton: bool = False) -> int:
    """What the last norm and `linear_logps` keep besides the memory of the weight's gradient: the scored states before
    and after the norm, slabs, and 24 bytes a row."""
    rows, columns = _padded(scored), model.vocab_size if triton and stash else 0
    if not triton:
        hidden, weight = (torch.empty(length, model.hidden_size, device="meta") for length in (rows, model.vocab_size))
        slabs = cut_slabs(torch.empty(0, dtype=torch.int64), model.vocab_size)
        own = math.inf if stash else KEPT_SHARE * weight.numel()
        columns = make_room(hidden, slabs, own, weight).kept.numel() // max(1, rows)
    return rows * ((2 * model.hidden_size + columns) * itemsize + 24)


def head_working_bytes(model: ModelConfig, scored: int, *, itemsize: int, triton: bool = False) -> int:
    """Working memory of the head's backward besides its weight's gradient: a slab, wide too where the dtype is not, the
    states' gradient in float32, its share from one slab, and the states times their factors."""
    rows = _padded(scored)
    slab = min(SLAB if triton else SLAB_COLUMNS, model.vocab_size) * itemsize
    if itemsize < FLOAT32 and not triton:
        slab += SLAB_COLUMNS * FLOAT32
    return rows * (slab + model.hidden_size * (2 * FLOAT32 + 2 * itemsize))


def block_working_bytes(model: ModelConfig, tokens: int, *, itemsize: int, form: str = "blocks") -> int:
    """Working memory of one block's backward: the larger of the MLP's (four (T, F) and the gradients that come and go)
    and attention's (gradients of q, k, v; scores, probabilities and their gradient of one batch of blocks)."""
    rows, queries = _padded(tokens), model.num_heads * model.head_dim
    mlp = rows * (4 * model.intermediate_size + 3 * model.hidden_size) * itemsize
    scores = 3 * model.num_heads * min(BATCH_SCORES, rows * rows) * itemsize if form == "blocks" else 0
    return max(mlp, rows * (4 * queries * itemsize + 2 * queries * FLOAT32) + scores)


def _padded(rows: int) -> int:
    """The decoder pads tokens and scored tokens alike."""
    return -(-rows // SHAPE_STEP) * SHAPE_STEP


def plan_memory(
    model: ModelConfig, config: Config, work: Work, world_size: int, *, on_gpu: bool = False, form: str = "blocks"
) -> MemoryPlan:
    """The plan of the fullest of `world_size` ranks.

    on_gpu: Triton's working memory, and the snapshot and offloaded shards are not on the device. form: of attention, as
    `attention_form.choose_form` returns it.
    """
    shards, how = num_shards(config, world_size), config.train.activation_checkpointing
    itemsize = FLOAT32 if config.train.dtype == "float32" else 2
    stays = _staying_bytes(model, config, shards)
    gradients, tokens = stays["gradients"], _padded(work.tokens)
    states = activation_bytes(model, work.tokens, itemsize=itemsize, how=how, form=form)
    states += tokens * model.hidden_size * itemsize  # the embedding's result, or the last block's
    again = 0 if how == "none" else tokens * kept_per_token(model, itemsize, form)
    head_kept = head_kept_bytes(model, work.scored, itemsize=itemsize, stash=config.kernels.stash, triton=on_gpu)
    head_works = head_working_bytes(model, work.scored, itemsize=itemsize, triton=on_gpu)
    head_gradient = model.vocab_size * model.hidden_size * itemsize
    embedding_gradient = 0 if config.lora.enabled else head_gradient  # of a head that is not tied, as large
    dequantised = 0
    if config.lora.enabled:
        sizes = adapter_sizes(model, config, shards)
        added = tokens * sizes.kept * itemsize
        states += added * (model.num_layers if how == "none" else 0)
        again += added if how != "none" else 0
        # a frozen head keeps the gradient of its states, in float32, and no slab
        head_kept = _padded(work.scored) * model.hidden_size * (2 * itemsize + FLOAT32)
        head_gradient = 0
        dequantised = sizes.dequantised * (2 * FLOAT32 + itemsize)  # values, what they are made from, in this dtype
    if config.train.objective == "prm":  # one number a step: its state before and after the norm, and in float32
        head_kept = _padded(work.scored) * model.hidden_size * (2 * itemsize + FLOAT32)
        head_works = head_gradient = 0
    # of tied weights, the head's gradient waits for the embedding's rows to the end of the backward
    waits = head_gradient if model.tie_word_embeddings else 0
    block_works = again + block_working_bytes(model, work.tokens, itemsize=itemsize, form=form)

    # gradients are there from the first micro-batch on, the buffers of a bf16 run always
    early = gradients if work.micro_batches > 1 or stays["working_copies"] else 0
    moments = [
        early + states + head_kept + head_works + head_gradient,
        early + states + waits + block_works + dequantised,
        gradients + embedding_gradient,
    ]
    gathered = 0
    if shards:
        extra = _sharding_bytes(model, config, work, shards, itemsize=itemsize, on_gpu=on_gpu)
        moments, gathered = [moment + more for moment, more in zip(moments, extra, strict=True)], max(extra)
    reference = _reference_bytes(model, config, work, shards, itemsize)
    snapshot = stays["masters"] + stays["optimizer"] if config.checkpoint.asynchronous else 0
    parameters = stays["frozen"] + stays["masters"] + stays["working_copies"]
    peak = parameters + stays["optimizer"] + max(moments)
    if on_gpu and shards and config.dist.cpu_offload:
        peak -= stays["masters"] + stays["optimizer"] + early
    if on_gpu:
        peak += reference if config.reference.mode == "model" else 0
    else:
        peak += SHARDED_HEAP if shards else round(HEAP_HOLES * peak)
        peak += reference + snapshot
    return MemoryPlan(
        parameters, gradients, stays["optimizer"], states + again, head_kept + head_works + head_gradient, gathered,
        reference, snapshot, peak,
    )  # fmt: skip


def _staying_bytes(model: ModelConfig, config: Config, shards: int) -> dict[str, int]:
    """What a rank holds from the first step on: masters, working copies in the compute dtype where they differ from the
    masters, gradients, moments. A rank's rows of each tensor are rounded up, as FSDP2 pads them."""
    each = 2 if config.train.dtype == "pure_bf16" else FLOAT32
    shapes = _trained_shapes(model, config)
    held = sum(-(-shape[0] // max(1, shards)) * math.prod(shape[1:]) for shape in shapes)
    trained, frozen = sum(map(math.prod, shapes)), 0
    if config.train.objective == "prm" and not model.tie_word_embeddings:  # the language model's head is left as it is
        frozen = each * -(-model.vocab_size // max(1, shards)) * model.hidden_size
    if config.lora.enabled:
        sizes = adapter_sizes(model, config, shards)
        held, trained, frozen = sizes.own, sizes.whole, sizes.frozen
    copies = 2 * trained if config.train.dtype == "bf16" and not shards else 0
    return {
        "frozen": frozen,
        "masters": held * each,
        "working_copies": copies,
        "gradients": held * each,
        "optimizer": 2 * held * each,
    }


def _trained_shapes(model: ModelConfig, config: Config) -> list[tuple[int, ...]]:
    """Of what is trained where all weights are: with a reward head, the language model's is not."""
    named = parameter_shapes(model)
    if config.train.objective != "prm":
        return list(named.values())
    kept = [shape for name, shape in named.items() if not name.startswith("lm_head.")]
    return [*kept, (1, model.hidden_size), (1,)]


def _reference_bytes(model: ModelConfig, config: Config, work: Work, shards: int, itemsize: int) -> int:
    """Cached rows, in CPU memory, or the frozen model. Of a sharded one, embedding and head stay gathered: FSDP2 does
    not drop the root's weights after a forward pass."""
    if config.train.objective != "dpo":
        return 0
    if config.reference.mode == "model" and config.lora.enabled and config.reference.path is None:
        return 0  # the policy itself
    if config.reference.mode == "cache":
        return FLOAT32 * work.reference_numbers + ROW_OVERHEAD * work.reference_rows
    root = root_and_block(model)[0] if shards else 0
    shapes = parameter_shapes(model).values()
    held = sum(-(-shape[0] // max(1, shards)) * math.prod(shape[1:]) for shape in shapes)
    return (held + root) * itemsize


def root_and_block(model: ModelConfig) -> tuple[int, int]:
    """Numbers in the root's group of FSDP2 (embedding, head where it is not tied, last norm) and in one block's."""
    shapes = parameter_shapes(model)
    blocks = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers."))
    return sum(map(math.prod, shapes.values())) - blocks, blocks // model.num_layers


def _sharding_bytes(
    model: ModelConfig, config: Config, work: Work, shards: int, *, itemsize: int, on_gpu: bool
) -> tuple[int, int, int]:
    """What FSDP2 adds at each of the three moments.

    The root's weights are whole from the first to the last use. Of blocks, two are gathered at a time in the backward,
    beside the flat buffer that they arrive in, while one's gradients are reduced. A reduction needs its input in
    float32, which gloo copies once more, and its result.
    """
    root, block = root_and_block(model)
    if config.lora.enabled:  # gathered in the compute dtype; the gradients of adapters are small
        whole = FLOAT32 * adapter_sizes(model, config, shards).whole
        late = whole if config.dist.grad_sync == "last" and work.micro_batches > 1 else 0
        blocks = 3 * block * itemsize + 3 * whole // model.num_layers
        return root * itemsize + late, root * itemsize + blocks + late, root * itemsize + late
    held_back = 0
    if config.dist.grad_sync == "last" and work.micro_batches > 1:  # whole gradients wait for the last micro-batch
        held_back = FLOAT32 * sum(map(math.prod, parameter_shapes(model).values()))
    wide = FLOAT32 if on_gpu else 2 * FLOAT32
    blocks = block * (3 * itemsize + itemsize + wide)
    # the end: gathered weights beside all gradients; or gradients beside the reduction's input; or the reduction alone
    untied = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size * itemsize
    reducing = (
        root * max(itemsize + FLOAT32, wide + FLOAT32 // shards) - model.vocab_size * model.hidden_size * itemsize
    )
    ending = max(root * itemsize + untied, reducing)
    return root * itemsize + held_back, root * itemsize + blocks + held_back, ending + held_back
