"""How long a training step would take on GPUs that are not here: `python -m trainer.bench predict --model DIR`.

A prediction, not a measurement. From the model's shapes follow the floating-point operations of a step, the bytes that
FSDP2 sends and the memory of a rank (trainer.memory_plan); a test compares the bytes with those of a real run. The
speed of a GPU and its links are the maker's figures, times the shares of them that --share and --link-share assume.
Nothing is loaded but config.json. Not counted: latencies of collectives, data loading, evaluation, saves.

Letters: T tokens, N scored tokens, D width, V vocabulary.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config_sections import Config, DataConfig, DistConfig, TrainConfig
from trainer.config_sections import ModelConfig as ModelSection
from trainer.errors import UserError
from trainer.memory_plan import FLOAT32, Work, plan_memory, root_and_block
from trainer.models.config import ModelConfig

BF16 = 2
UPDATE_BYTES = 7 * FLOAT32
"""What AdamW reads and writes for a number: master and moments both, the gradient once."""


@dataclass(frozen=True)
class Machine:
    """A GPU as its maker describes it, dense bf16; links in bytes a second, one direction, for each GPU."""

    flop_s: float
    memory_s: float
    inner_s: float
    """Between the GPUs of a node."""
    outer_s: float
    """Between nodes."""
    node: int
    """GPUs of a node."""


H100 = Machine(flop_s=989.5e12, memory_s=3.35e12, inner_s=450e9, outer_s=50e9, node=8)
"""H100 SXM (NVIDIA data sheet: NVLink 900 GB/s in both directions together) in a node of 8 with one 400 Gb/s adapter
each (NVIDIA DGX H100 data sheet)."""


@dataclass(frozen=True)
class Prediction:
    """Of one step of one rank."""

    memory: int
    """Bytes at the peak."""
    compute_s: float
    links_s: float
    tokens: int
    """Of all ranks."""

    @property
    def step_s(self) -> tuple[float, float]:
        """With everything that is sent hidden behind computing, and with nothing."""
        return max(self.compute_s, self.links_s), self.compute_s + self.links_s


def flop_floor(model: ModelConfig, lengths: Sequence[Sequence[int]], scored: int, *, adapters: int = 0) -> float:
    """FLOP of forward and backward that no step on groups of these branch lengths can do without (trainer.bench).

    adapters: numbers of the adapters that are trained in place of the weights, which then get no gradient; 0: none.
    """
    tokens, visible = 0, 0
    for prompt, *branches in lengths:
        tokens += prompt + sum(branches)
        visible += prompt * (prompt + 1) // 2 + sum(b * prompt + b * (b + 1) // 2 for b in branches)
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * visible
    body, each = root_and_block(model)[1] * model.num_layers, 4 if adapters else 6
    products = each * (body * tokens + model.hidden_size * model.vocab_size * scored)
    return products + 6 * adapters * tokens + attention


def gathered_bytes(model: ModelConfig) -> int:
    """Of a micro-batch: the blocks' weights in bf16 for the forward and again for the backward, the root's once."""
    root, block = root_and_block(model)
    return BF16 * (2 * block * model.num_layers + root)


def reduced_bytes(model: ModelConfig) -> int:
    """Of a micro-batch: all gradients in float32."""
    root, block = root_and_block(model)
    return FLOAT32 * (block * model.num_layers + root)


def predict(
    model: ModelConfig, config: Config, pairs: int, prompt: int, completion: int, *, micro_batches: int, ranks: int,
    machine: Machine = H100, share: float, link_share: float,
) -> Prediction:  # fmt: skip
    """A step of `micro_batches` micro-batches on each of `ranks`, each of so many pairs of these lengths in tokens."""
    group, scored = (prompt, completion, completion), 2 * completion * pairs
    flop = flop_floor(model, [group] * pairs, scored)
    head = 2.0 * model.hidden_size * model.vocab_size * scored
    again = 0.0 if config.kernels.stash else head  # logits once more in the backward
    if config.train.activation_checkpointing == "full":
        again += (flop - 3 * head) / 3  # blocks: the forward once more
    shards = ranks // config.dist.replicas
    root, block = root_and_block(model)
    numbers = root + block * model.num_layers
    compute_s = micro_batches * (flop + again) / (machine.flop_s * share)
    compute_s += UPDATE_BYTES * numbers / shards / machine.memory_s
    reductions = micro_batches if config.dist.grad_sync == "every" else 1
    sent = micro_batches * gathered_bytes(model) + reductions * reduced_bytes(model)
    links_s = _ring_s(sent, shards, machine)
    if config.dist.replicas > 1:  # once a step, each rank's rows of the gradients over the copies: there and back
        across = 2 * reduced_bytes(model) / shards * (config.dist.replicas - 1) / config.dist.replicas
        links_s += across / (machine.outer_s if ranks > machine.node else machine.inner_s)
    work = Work(sum(group) * pairs, scored, micro_batches)
    memory = plan_memory(model, config, work, ranks, on_gpu=True, form="flex").peak
    return Prediction(memory, compute_s, links_s / link_share, sum(group) * pairs * micro_batches * ranks)


def _ring_s(sent: float, shards: int, machine: Machine) -> float:
    """Seconds of gathers and reductions of `sent` bytes in all over ranks that lie node by node: all but a rank's own
    part comes in over its inner link, and all but a node's own part over the node's outer links together."""
    nodes = -(-shards // machine.node)
    inner = sent * (shards - 1) / shards / machine.inner_s
    return max(inner, sent * (nodes - 1) / nodes / (machine.outer_s * machine.node))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m trainer.bench predict`."""
    parser.add_argument("--model", required=True, help="folder with a config.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="numbers of GPUs")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a micro-batch on each GPU")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro-batches of a step on each GPU")
    parser.add_argument("--activation-checkpointing", default="full", choices=["none", "full"])
    parser.add_argument("--grad-sync", default="every", choices=["every", "last"])
    parser.add_argument(
        "--share", type=float, default=0.4, help="of the GPU's speed that computing is assumed to reach"
    )
    parser.add_argument("--link-share", type=float, default=0.7, help="of the links' speed that is assumed")
    parser.add_argument("--json", help="write the numbers to this file too")


def prediction_table(args: argparse.Namespace) -> dict[str, object]:
    """The numbers that the command writes, for one copy of the model and, over several nodes, for a copy a node."""
    for name in ("share", "link_share"):
        if not 0 < getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0 and at most 1")
    if min(args.pairs, args.prompt, args.completion, args.micro_batches, *args.ranks) < 1:
        raise UserError("numbers of pairs, tokens, micro-batches and ranks must be 1 or more")
    model = ModelConfig.from_folder(args.model)
    numbers: dict[str, object] = {}
    for ranks in args.ranks:
        nodes = ranks // H100.node if ranks % H100.node == 0 else 1
        for replicas in sorted({1, nodes}):
            found = predict(
                model, _config(args, replicas), args.pairs, args.prompt, args.completion, ranks=ranks,
                micro_batches=args.micro_batches, share=args.share, link_share=args.link_share,
            )  # fmt: skip
            name = f"ranks_{ranks}" if replicas == 1 else f"ranks_{ranks}_replicas_{replicas}"
            least, most = found.step_s
            numbers |= {
                f"{name}/memory_gib": found.memory / 2**30,
                f"{name}/compute_s": found.compute_s,
                f"{name}/links_s": found.links_s,
                f"{name}/step_s_least": least,
                f"{name}/step_s_most": most,
                f"{name}/tokens_per_s_least": found.tokens / most,
                f"{name}/tokens_per_s_most": found.tokens / least,
            }
    return numbers


def _config(args: argparse.Namespace, replicas: int) -> Config:
    return Config(
        model=ModelSection(path=args.model),
        data=DataConfig(train=("-",)),
        train=TrainConfig(activation_checkpointing=args.activation_checkpointing),
        dist=DistConfig(replicas=replicas, grad_sync=args.grad_sync),
    )
