"""Ranks: the sole caller of collectives. One process is the same path with a world of one and no process group."""

import os
from collections.abc import Iterable

import torch
import torch.distributed as torch_dist
from torch import Tensor

LAUNCHER = os.getppid()


def rank() -> int:
    """This process's number, 0 .. world_size - 1, from torchrun's environment."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of the run, from torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def launcher_is_gone() -> bool:
    """Has the torchrun that started this worker died? A run started without torchrun outlives its shell."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != LAUNCHER


def start() -> None:
    """Join the process group when there is more than one rank (gloo: this version trains on CPU)."""
    if world_size() > 1 and not torch_dist.is_initialized():
        torch_dist.init_process_group("gloo")


def stop() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def barrier() -> None:
    if torch_dist.is_initialized():
        torch_dist.barrier()


def broadcast_object(value: object) -> object:
    """Rank 0's value on every rank."""
    if not torch_dist.is_initialized():
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over the ranks in rank order; a rank that had no work may lack keys that others have."""
    totals: dict[str, float] = {}
    for part in gather_objects(values):
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def max_over_ranks(value: float) -> float:
    if not torch_dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX)
    return tensor.item()


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum `.grad` of every parameter over the ranks. Losses are already divided by global counts: no averaging."""
    if not torch_dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is not None:
            torch_dist.all_reduce(parameter.grad)


def gather_objects(value: object) -> list:
    """Every rank's value, in rank order, on every rank."""
    if not torch_dist.is_initialized():
        return [value]
    gathered: list = [None] * world_size()
    torch_dist.all_gather_object(gathered, value)
    return gathered


def first_failure(message: str | None) -> str | None:
    """The message of the lowest rank that has one; None when no rank has. So all ranks stop together."""
    return next((text for text in gather_objects(message) if text is not None), None)
