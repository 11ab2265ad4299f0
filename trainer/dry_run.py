"""`--run.dry_run=true`: what the run would need in memory, a rank, without loading weights and without training.

Opens the data (and tokenizes them into the cache, as any start does), cuts the first steps into micro-batches as the
run would, and prints the plan (`trainer.memory_plan`) for the world size of the environment and for 1, 2, 4 and 8
ranks. WORLD_SIZE, which torchrun sets, may be set by hand to plan for ranks that are not there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from data_tools.grouping import cut_microbatches
from data_tools.shards import Shard
from trainer import dist
from trainer.batch import scored_tokens
from trainer.config import Config
from trainer.loader import Loader
from trainer.memory_plan import MemoryPlan, Work, plan_memory
from trainer.models.config import ModelConfig
from trainer.startup import attention_form, make_objective, open_data, say

SURVEYED_STEPS = 200
WORLD_SIZES = (1, 2, 4, 8)
LABELS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "head": "head",
    "gathered": "gathered for a moment (FSDP2)",
    "reference": "reference",
    "snapshot": "copy for asynchronous saves",
    "peak": "expected peak",
}
WORK_LABELS = {
    "tokens": "largest micro-batch, tokens",
    "scored": "largest micro-batch, scored tokens",
    "micro_batches": "micro-batches a step",
}


def dry_run(config: Config) -> None:
    """Print the plan on rank 0. Raises UserError for what a start would refuse about data and configuration."""
    device = dist.choose_device(config.run.device)
    shard, held_out = open_data(config)
    model, form = ModelConfig.from_folder(config.model.path), attention_form(config, device)
    works, plans = {}, {}
    for world_size in sorted({*WORLD_SIZES, dist.world_size()}):
        if world_size % config.dist.replicas:
            continue
        works[world_size] = survey(config, shard, world_size, held_out_rows=len(held_out))
        plans[world_size] = plan_memory(
            model, config, works[world_size], world_size, on_gpu=device.type == "cuda", form=form
        )
    for line in describe(plans, works, config, device.type):
        say(line)


def survey(config: Config, shard: Shard, world_size: int, *, held_out_rows: int = 0) -> Work:
    """The largest micro-batch of the first steps on any rank, and the size of the reference cache."""
    loader = Loader(shard, config.train.global_batch, config.train.tokens_per_microbatch, config.train.seed)
    total_steps = config.train.max_steps or config.train.epochs * loader.steps_per_epoch
    score_prompt = make_objective(config).scores_prompt
    largest, scored_of = Work(0, 0, 0), {}
    for step in range(min(total_steps, SURVEYED_STEPS)):
        indices = loader.step_indices(step)
        tokens = {int(index): int(shard.group_tokens[index]) for index in indices}
        for index in indices:
            scored_of[int(index)] = scored_tokens(shard[int(index)], score_prompt=score_prompt)
        for rank in range(world_size):
            cut = cut_microbatches(
                indices,
                shard.group_tokens[np.asarray(indices)],
                budget=config.train.tokens_per_microbatch,
                world_size=world_size,
                rank=rank,
            )
            largest = replace(
                largest,
                tokens=max(largest.tokens, *(_total(tokens, batch) for batch in cut)),
                scored=max(largest.scored, *(_total(scored_of, batch) for batch in cut)),
                micro_batches=max(largest.micro_batches, len(cut)),
            )
    groups = len(loader.used_indices(total_steps)) + held_out_rows
    mean_scored = sum(scored_of.values()) / len(scored_of)
    return replace(largest, reference_rows=2 * groups, reference_numbers=round(mean_scored * groups))


def _total(values: Mapping[int, int], members: Sequence[int]) -> int:
    return sum(values[index] for index in members)


def describe(plans: Mapping[int, MemoryPlan], works: Mapping[int, Work], config: Config, device: str) -> list[str]:
    """The plans as a table, world sizes in columns, MiB a rank; the run's own column is marked."""
    own = dist.world_size()
    train = config.train
    lines = [
        f"dry run: memory of one rank in MiB, expected, on {device} ({train.dtype}, train.activation_checkpointing "
        f"{train.activation_checkpointing}, dist.strategy {config.dist.strategy}); nothing is loaded or trained",
        _row("ranks", [f"{n} (this run)" if n == own else str(n) for n in plans]),
    ]
    for name, label in LABELS.items():
        lines.append(_row(label, [f"{getattr(plan, name) / 2**20:.1f}" for plan in plans.values()]))
    for name, label in WORK_LABELS.items():
        lines.append(_row(label, [str(getattr(work, name)) for work in works.values()]))
    lines.append(
        "the peak is of the fullest moment, not the sum of the rows; on a CPU, Python and torch take about 250 MiB more"
    )
    return lines


def _row(label: str, values: Sequence[str]) -> str:
    return f"  {label:<36}" + "".join(f"{value:>14}" for value in values)
