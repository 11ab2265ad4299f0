"""Ranks and their devices: the sole caller of collectives. One process is the same path with a world of one and no
process group."""

import os
from collections.abc import Iterable

import torch
import torch.distributed as torch_dist
from torch import Tensor

from trainer.errors import ConfigError

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


def choose_device(name: str = "auto") -> torch.device:
    """This rank's device for `run.device`: "auto" is a GPU where PyTorch finds one. Rank LOCAL_RANK of a machine, as
    torchrun sets it, has the GPU of that number. Raises ConfigError where there is none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("run.device", name, "PyTorch finds no GPU here; use auto or cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        problem = (
            f"local rank {index} has no GPU, PyTorch finds {count}; start {count} ranks on this machine or use cpu"
        )
        raise ConfigError("run.device", name, problem)
    return torch.device("cuda", index)


def start(device: torch.device) -> None:
    """Make `device` this process's GPU, if it is one, and join the process group when there is more than one rank:
    NCCL for tensors on a GPU, gloo for those in CPU memory and for objects."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() > 1 and not torch_dist.is_initialized():
        torch_dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


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
