"""The reference pass: score what a cache does not hold yet, over all ranks, and save it as it goes.

The batches are a pure function of the completions to score and the token budget: longest first, cut where the budget is
full. Batch i belongs to rank i mod W, and rows are saved after whole rounds over the ranks, so a killed pass leaves the
first batches done. What is left then falls into the very batches that the pass would have gone on with, at any world
size. That matters for the last bits: a row's number depends in rounding on which rows share its batch (and on the
thread count), so only a pass of the same batches gives equal bits. A row once in the file never changes.
"""

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from data_tools.encode import Group
from trainer import dist
from trainer.batch import build_stream, idle_stream
from trainer.errors import RunError, TrainingStopped, UserError
from trainer.loader import rounds
from trainer.models.decoder import Decoder
from trainer.reference_cache import ReferenceCache, row_key, row_keys
from trainer.stop import StopRequest

SAVE_EVERY_S = 60.0
SAVE_SHARE = 0.05
"""A save writes the whole file; it waits until this share of the time at most goes into saving."""


def plan_batches(groups: Sequence[Group], budget: int) -> list[list[Group]]:
    """Groups in batches of at most `budget` tokens (a longer one stands alone), longest first, whatever their order.

    The plan of what is left after the first k batches is the rest of this plan.
    """
    batches: list[list[Group]] = []
    room = 0
    for group in sorted(groups, key=lambda group: (-len(group.ids), row_keys(group))):
        if not batches or len(group.ids) > room:
            batches.append([])
            room = budget
        batches[-1].append(group)
        room -= len(group.ids)
    return batches


@torch.no_grad()
def score_batch(model: Decoder, groups: Sequence[Group], device: torch.device) -> dict[bytes, np.ndarray]:
    """Float32 log-probs of every scored completion token of one batch, by row key. device: where the model computes."""
    stream = build_stream(groups)
    values = model(stream.to(device)).cpu()
    parts = iter(values.split(stream.segment_tokens.tolist()))
    rows = {}
    for group in groups:
        next(parts)  # the prompt's segment, which is empty
        for branch in range(1, len(group.lengths)):
            rows[row_key(group, branch)] = next(parts).numpy().copy()
    return rows


@torch.no_grad()
def score_missing(
    cache: ReferenceCache,
    missing: Sequence[Group],
    model: Decoder,
    *,
    device: torch.device,
    tokens_per_batch: int,
    save_every_s: float | None = None,
    progress: bool = False,
) -> None:
    """Score `missing`, the same on every rank; every rank has all rows then, and rank 0 has written the file.

    Every rank runs as many forward passes as any other: sharded weights are gathered by all ranks together. A rank is
    without a batch in the last round only. save_every_s: default SAVE_EVERY_S. Raises UserError on every rank when the
    file cannot be written, and TrainingStopped, with all rows saved, after a signal on any rank or without torchrun.
    """
    save_every_s = SAVE_EVERY_S if save_every_s is None else save_every_s
    batches = plan_batches(missing, tokens_per_batch)
    rows: dict[bytes, np.ndarray] = {}
    done, saved_at, wait_s = 0, time.monotonic(), save_every_s
    hidden = not dist.is_main() or not progress or None  # None: only on a terminal
    bar = tqdm(total=len(batches), desc="reference", unit="batch", disable=hidden, dynamic_ncols=True)
    with bar, StopRequest() as stop:
        for batch in rounds(batches[dist.rank() :: dist.world_size()]):
            if batch is None:
                model(idle_stream().to(device))
            else:
                rows |= score_batch(model, batch, device)
            done = min(done + dist.world_size(), len(batches))
            bar.update(done - bar.n)
            # one reduction, so that all ranks save or none: how long a save is due, endless where a rank is to stop
            due_s = dist.max_over_ranks(math.inf if stop.asked() else time.monotonic() - saved_at - wait_s)
            if due_s >= 0:
                started = time.monotonic()
                _share(cache, rows)
                rows, saved_at = {}, time.monotonic()
                wait_s = max(save_every_s, dist.max_over_ranks(saved_at - started) / SAVE_SHARE)
            if due_s == math.inf:
                why = stop.reason or "another rank was asked to stop"
                problem = f"{why}; {done} of {len(batches)} batches are scored, start the same command again to go on"
                raise TrainingStopped(f"{cache.path}: {problem}")
    _share(cache, rows)
    cache.read()  # every rank, so that all train with the numbers that a resumed run finds


def _share(cache: ReferenceCache, rows: dict[bytes, np.ndarray]) -> None:
    """Give every rank's new rows to every rank; rank 0 saves them."""
    for part in dist.gather_objects(rows):
        cache.add(part)
    message = None
    if dist.is_main():
        try:
            cache.save()
        except RunError as error:
            message = str(error)
    if (failure := dist.first_failure(message)) is not None:
        raise UserError(failure)
