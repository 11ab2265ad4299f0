"""The training loop: hops 4 to 12 of one step, in order, and what happens between steps.

`Run` holds everything a step needs (trainer.startup makes it). One step is: plan, micro-batches (forward, loss,
backward), clip, update, one row of metrics.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_tools.encode import Group
from trainer import adapt, checkpoint, dist
from trainer.batch import Stream, idle_stream
from trainer.config import Config
from trainer.errors import RunError, TrainingStopped
from trainer.export import export
from trainer.health import Health, is_solved
from trainer.loader import Loader, length_sorted_batches, rounds
from trainer.lora import Dropout
from trainer.metrics import MetricsWriter, peak_memory_mib
from trainer.models.decoder import Decoder
from trainer.numerics import COMPUTE_DTYPES, STEP0_TOLERANCE
from trainer.objective import Counts, Objective, Terms, group_weights
from trainer.optim import AdamW, MasterWeights, clip_by_global_norm, learning_rate_at
from trainer.prm import PrmTable, ProcessObjective, step_auc
from trainer.reference_cache import ReferenceCache
from trainer.run_folder import EXPORT
from trainer.saver import Saver
from trainer.stop import LONG_STEP_S, StopRequest


@dataclass
class Run:
    """All that a training run consists of; the loop changes `step`, weights, optimizer and metrics only."""

    config: Config
    model: Decoder
    masters: MasterWeights
    optimizer: AdamW
    objective: Objective | ProcessObjective
    loader: Loader
    eval_groups: Sequence[Group]
    cache: ReferenceCache | None
    reference_model: Callable[[Stream], Tensor] | None
    starts_at_reference: bool
    """The reference is where the policy starts, so both must agree before the first update."""
    manifest: checkpoint.Manifest
    total_steps: int
    step: int = 0
    """Updates done."""
    solved_steps: int = 0
    """The last so many steps were solved (trainer.health)."""
    step_s: float = math.inf
    """Seconds that the last step took, the same number on every rank; before the first, nobody knows."""
    stop: StopRequest = field(default_factory=StopRequest)
    dropout: Dropout | None = None
    """Of the adapters, where they drop anything."""

    @property
    def finished(self) -> bool:
        """All steps are done, or `train.stop_when_solved` says that enough are."""
        return self.step >= self.total_steps or self.solved

    @property
    def solved(self) -> bool:
        return 0 < self.config.train.stop_when_solved <= self.solved_steps

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return dist.choose_device(self.config.run.device)

    @property
    def writers(self) -> checkpoint.Writers:
        """Of a sharded model, each rank of the first copy writes its own rows; else rank 0 writes everything."""
        if not self.masters.sharded:
            return checkpoint.Writers(0 if dist.is_main() else None)
        count = dist.world_size() // self.config.dist.replicas
        return checkpoint.Writers(dist.rank() if dist.rank() < count else None, count)

    def weights(self) -> list[tuple[str, Tensor]]:
        """Every weight of a model without adapters: masters, and what is not trained beside a reward head."""
        trained = dict(self.masters.named())
        return [(name, trained.get(name, own)) for name, own in self.model.named_parameters()]

    def sum_over_shards(self, value: float) -> float:
        """Each rank's `value`, summed over the ranks that hold one copy of a sharded model between them."""
        return dist.sum_value(value) / self.config.dist.replicas

    def reference_logps(self, groups: Sequence[Group], stream: Stream) -> Tensor | None:
        """(N,) float32 reference log-probs in stream order, or None for objectives without a reference."""
        if self.cache is not None:
            return self.cache.token_logps(groups, stream)
        if self.reference_model is not None:
            with torch.no_grad():
                return self.reference_model(stream)
        return None


def train(run: Run, metrics: MetricsWriter | None) -> None:
    """Train until `run.finished` and save. Rank 0 passes the writer of metrics, the others None.

    Ends earlier, with `run.stop.agreed` and a checkpoint of the last whole step, once somebody asked `run.stop`.
    """
    config = run.config
    health = Health(beta=config.loss.beta if run.objective.needs_reference else None)
    if metrics is not None:  # what a kill left between a save and the removal of older ones
        checkpoint.remove_old(run.folder / "checkpoints", config.checkpoint.keep_last, step=run.step)
    bar = tqdm(
        total=run.total_steps,
        initial=run.step,
        unit="step",
        disable=metrics is None or not config.run.progress or None,  # None: only on a terminal
        dynamic_ncols=True,
    )
    with bar, make_saver(run) as saver:
        while not run.finished and not run.stop.agreed:
            row = train_step(run)
            if row is None:
                break
            run.solved_steps = run.solved_steps + 1 if is_solved(row) else 0
            last = run.finished
            evaluated = bool(run.eval_groups) and (last or (config.eval.every and run.step % config.eval.every == 0))
            if evaluated:
                row |= {f"eval_{name}": value for name, value in evaluate(run).items()}
            row |= saver.costs()
            if metrics is not None:
                if last or evaluated or run.step % config.run.log_every == 0:
                    metrics.write(row)
                for warning in health.check(row):
                    tqdm.write(f"health: {warning}")
                bar.update()
                bar.set_postfix_str(" ".join(f"{name.split('/')[-1]} {row[name]:.4g}" for name in health.shown(row)))
            if last or run.step % config.checkpoint.every == 0:
                save_checkpoint(run, saver)
        if run.stop.agreed and run.step != saver.saved_step:
            save_checkpoint(run, saver)
    dist.barrier()


def train_step(run: Run) -> dict[str, float] | None:
    """One update; returns the row of metrics, the same numbers on every rank.

    Returns None, with nothing updated, where steps are long and the ranks agreed between micro-batches to stop.
    """
    started, config = time.perf_counter(), run.config.train
    indices = run.loader.step_indices(run.step)
    learning_rate = learning_rate_at(
        run.step,
        peak=config.learning_rate,
        schedule=config.schedule,
        total_steps=run.total_steps,
        warmup_ratio=config.warmup_ratio,
    )
    run.masters.zero_grad()
    done = _forward_and_backward(run, indices)
    if done is None:
        return None
    sums, bad_rows, steps = done
    run.masters.finish_backward()
    if run.masters.sharded:
        norm = clip_by_global_norm(run.masters.masters, config.max_grad_norm, total=run.sum_over_shards)
    else:
        dist.sum_gradients(run.masters.masters)
        norm = clip_by_global_norm(run.masters.masters, config.max_grad_norm)
    seconds = time.perf_counter() - started
    totals = dist.sum_over_ranks(sums | {"stop": run.stop.asked(), "seconds": seconds})
    run.stop.agreed, run.step_s = totals.pop("stop") > 0, totals.pop("seconds") / dist.world_size()
    if run.objective.compares_steps:
        totals |= step_auc(dist.gather_objects(steps))
    if not (math.isfinite(norm) and math.isfinite(totals["loss"])):
        _stop_for_non_finite(run, norm, totals["loss"], bad_rows, indices)
    run.optimizer.lr = learning_rate
    run.optimizer.step()
    run.masters.refresh()
    run.step += 1
    elapsed = time.perf_counter() - started
    stream_tokens = totals.pop("tokens")
    return {
        "step": run.step,
        "epoch": run.step / run.loader.steps_per_epoch,
        **totals,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "time": time.time(),
        "perf/step_s": elapsed,
        "perf/pairs_per_s": len(indices) / elapsed,
        "perf/tokens_per_s": stream_tokens / elapsed,
        "perf/token_imbalance": dist.max_over_ranks(sums["tokens"]) * dist.world_size() / stream_tokens,
        "perf/peak_memory_mib": dist.max_over_ranks(peak_memory_mib()),
    }


def _forward_and_backward(
    run: Run, indices: Sequence[int]
) -> tuple[dict[str, float], list[str], list[tuple[float, float]]] | None:
    """The micro-batches of a step on this rank: its metric sums, with its `tokens`, the rows with non-finite numbers,
    and what is known of single steps (`Terms.steps`). None where the ranks agreed to stop (`train_step`)."""
    counts = run.objective.count(run.loader.shard[int(index)] for index in indices)
    sums: dict[str, float] = {"tokens": 0.0}
    bad_rows: list[str] = []
    steps: list[tuple[float, float]] = []
    mismatch = None
    micro_batches = run.loader.micro_batches(indices)
    for number, members in enumerate(micro_batches):
        if run.step_s > LONG_STEP_S and dist.any_rank(run.stop.asked()):
            run.stop.agreed = True
            return None
        check_start = run.starts_at_reference and run.step == 0 and number == 0
        if run.dropout is not None:
            run.dropout.begin(run.config.train.seed, run.step, number, dist.rank())
        if run.masters.sharded:
            last = number == len(micro_batches) - 1
            run.model.set_requires_gradient_sync(last or run.config.dist.grad_sync == "every")
            run.model.set_requires_all_reduce(last)  # between copies of the shards, once a step is enough
        if not members:  # a rank without a group in this round still takes part in what all ranks do together
            _idle_micro_batch(run, check_start=check_start)
        else:
            groups = [run.loader.shard[index] for index in members]
            terms, own_bad_rows, mismatch = _micro_batch(run, groups, counts, check_start=check_start)
            bad_rows += own_bad_rows
            add_up(terms, sums, steps)
            sums["tokens"] += sum(len(group.ids) for group in groups)
        if check_start and (failure := dist.first_failure(mismatch)) is not None:
            raise RunError(run.cache.path if run.cache is not None else run.folder, failure)
    return sums, bad_rows, steps


def add_up(terms: Terms, sums: dict[str, float], steps: list[tuple[float, float]]) -> None:
    """A micro-batch's metrics onto those of the ones before it."""
    for name, value in terms.sums.items():
        sums[name] = sums.get(name, 0.0) + value.item()
    if terms.steps is not None:
        steps += map(tuple, terms.steps.tolist())


def _micro_batch(
    run: Run, groups: list[Group], counts: Counts, *, check_start: bool
) -> tuple[Terms, list[str], str | None]:
    """Forward, loss and backward of one micro-batch: its terms, the rows with non-finite numbers and, where
    `check_start` asks, what `unlike_reference` finds."""
    stream = run.objective.stream(groups).to(run.device)
    token_logps = run.model(stream, output=run.objective.output)
    reference = run.reference_logps(groups, stream)
    message = unlike_reference(_undropped(run, stream, token_logps), reference, run) if check_start else None
    terms = run.objective.terms(token_logps, reference, stream, group_weights(groups, run.device), counts)
    bad_rows = []
    if not torch.isfinite(terms.loss):
        bad_rows = _rows_with_non_finite(groups, stream, token_logps.detach())
    # FSDP2 averages gradients over the ranks, and the loss is divided by the counts of all ranks already
    (terms.loss * dist.world_size() if run.masters.sharded else terms.loss).backward()
    return terms, bad_rows, message


def _undropped(run: Run, stream: Stream, token_logps: Tensor) -> Tensor:
    """The policy's log-probs without dropout, for the comparison with the reference."""
    if run.dropout is None:
        return token_logps.detach()
    with torch.no_grad():
        return run.model(stream)


def _idle_micro_batch(run: Run, *, check_start: bool = False) -> None:
    """What a rank without a group does: nothing, or the gathers and reductions of a sharded model."""
    if not run.masters.sharded:
        return
    stream = idle_stream().to(run.device)
    loss = run.model(stream, output=run.objective.output).sum() * 0.0
    if run.reference_model is not None:  # gathers come in the order in which the other ranks ask for them
        with torch.no_grad():
            run.reference_model(stream)
    if check_start:
        _undropped(run, stream, loss)
    if torch.is_grad_enabled():
        loss.backward()


def unlike_reference(policy: Tensor, reference: Tensor, run: Run) -> str | None:
    """Step 0: policy and reference are the same weights, so log-probs (N,) must agree; what is wrong where they do not.

    Non-finite log-probs of the policy are left to the step, which names their rows.
    """
    if not torch.isfinite(policy).all():
        return None
    difference = (policy - reference).abs()
    dtype = COMPUTE_DTYPES[run.config.train.dtype]
    kind, worst = ("largest", difference.max()) if dtype == torch.float32 else ("mean", difference.mean())
    if worst <= STEP0_TOLERANCE[dtype]:
        if dist.is_main():
            print(f"step 0: {kind} |policy - reference| log-prob a token {worst:.2e}, the sigmoid loss starts at ln 2")
        return None
    return (
        f"before the first update policy and reference differ by {worst:.2e} nats a token "
        f"(allowed {STEP0_TOLERANCE[dtype]:.0e}): weights changed on disk while loading, a damaged reference "
        "cache, or arithmetic that changed under it; delete the cache file and start again"
    )


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Metrics of the held-out groups with the current weights, over all ranks; names without the `eval_` prefix."""
    counts = run.objective.count(run.eval_groups)
    mine = list(run.eval_groups)[dist.rank() :: dist.world_size()]
    sums: dict[str, float] = {}
    steps: list[tuple[float, float]] = []
    for batch in rounds(length_sorted_batches(mine, run.config.train.tokens_per_microbatch)):
        if batch is None:
            _idle_micro_batch(run)
            continue
        groups = [mine[index] for index in batch]
        stream = run.objective.stream(groups).to(run.device)
        token_logps = run.model(stream, output=run.objective.output)
        reference = run.reference_logps(groups, stream)
        weights = group_weights(groups, run.device)
        add_up(run.objective.terms(token_logps, reference, stream, weights, counts), sums, steps)
    totals = dist.sum_over_ranks(sums)
    return totals | step_auc(dist.gather_objects(steps)) if run.objective.compares_steps else totals


def make_saver(run: Run) -> Saver:
    """Every rank makes one at the same point. A save that fails in the background asks the run to stop."""
    return Saver(
        run.folder / "checkpoints",
        keep_last=run.config.checkpoint.keep_last,
        asynchronous=run.config.checkpoint.asynchronous,
        saved_step=run.step,
        writers=run.writers,
        timeout_s=run.config.dist.timeout_s,
        on_failure=run.stop.ask,
    )


def save_checkpoint(run: Run, saver: Saver) -> None:
    """`checkpoints/step_N` of the present state; older ones are removed after it. Raises TrainingStopped."""
    state = checkpoint.state_of(run.masters.named(), run.optimizer)
    saver.save(replace(run.manifest, step=run.step, solved_steps=run.solved_steps), state)


def write_results(run: Run) -> list[Path]:
    """`export/`, `adapter/` from the masters, which every rank gives its rows of; raises TrainingStopped on every
    rank."""
    try:
        if run.config.lora.enabled:
            return adapt.write_results(run.config, run.model, run.masters.named(), run.folder)
        if run.config.run.export:
            table = PrmTable.of(run.config.prm).as_json() if run.config.train.objective == "prm" else None
            export(run.weights(), source=run.config.model.path, folder=run.folder / EXPORT, table=table)
            return [run.folder / EXPORT]
    except RunError as error:
        raise TrainingStopped(str(error)) from None
    return []


def _rows_with_non_finite(groups: list[Group], stream: Stream, token_logps: Tensor) -> list[str]:
    """Ids of the rows that have a non-finite log-prob; all rows of the micro-batch when none has one by itself."""
    bad_segments = set(stream.score_segments[~torch.isfinite(token_logps)].tolist())
    owners = [group.record_id for group in groups for _ in group.lengths]
    named = list(dict.fromkeys(owners[segment] for segment in sorted(bad_segments)))
    return named or [group.record_id for group in groups]


def _stop_for_non_finite(run: Run, norm: float, loss: float, bad_rows: list[str], indices: Sequence[int]) -> None:
    """Every rank comes here, since loss and norm are sums over all ranks."""
    rows = [row for part in dist.gather_objects(bad_rows) for row in part]
    rows = rows or [run.loader.shard[int(index)].record_id for index in indices]
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    raise TrainingStopped(
        f"step {run.step + 1}: loss {loss}, gradient norm {norm}; nothing was updated. Rows: {shown}. "
        "Look at these rows, lower train.learning_rate, or resume from an earlier checkpoint"
    )
