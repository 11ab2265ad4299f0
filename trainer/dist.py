"""Ranks and their devices: the sole caller of collectives. One process is the same path with a world of one and no
process group."""

import functools
import os
import socket
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.errors import ConfigError

LAUNCHER = os.getppid()
TIMEOUT_S = 600.0
"""How long a rank waits for another one, in seconds, unless `start` is told otherwise."""

REFUSED_S = 10.0
"""How long torchrun's store may refuse a worker, in seconds, before torchrun counts as gone."""

SideGroup = torch_dist.ProcessGroup | None
"""Ranks beside the main group; None: the main one, or a world of one."""


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


def start(device: torch.device, timeout_s: float = TIMEOUT_S) -> None:
    """Make `device` this process's GPU, if it is one, and join the process group when there is more than one rank:
    NCCL for tensors on a GPU, gloo for those in CPU memory and for objects. A rank that lets the others wait for
    `timeout_s` is given up (`lost_rank`)."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size() == 1 or torch_dist.is_initialized():
        return
    # torchrun keeps one store over all its restarts; the prefix keeps the keys of an attempt that died out of the next
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    serves = is_main() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience, address = timedelta(seconds=timeout_s), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _find_torchrun(address)
    store = torch_dist.TCPStore(*address, is_master=serves, timeout=patience, wait_for_workers=False)
    torch_dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=torch_dist.PrefixStore(f"attempt{attempt}", store),
        rank=rank(),
        world_size=world_size(),
        timeout=patience,
    )


def _find_torchrun(address: tuple[str, int]) -> None:
    """Raises DistNetworkError where nobody listens at torchrun's store. It does before it starts workers, so it has
    died; torch would knock for `timeout_s`, and the worker would hold the run's lock meanwhile."""
    deadline = time.monotonic() + REFUSED_S
    while True:
        try:
            socket.create_connection(address, timeout=REFUSED_S).close()
            return
        except ConnectionRefusedError:
            if launcher_is_gone() or time.monotonic() > deadline:
                problem = f"torchrun, which listened at {address[0]}:{address[1]}, is gone"
                raise torch_dist.DistNetworkError(problem) from None
            time.sleep(0.1)
        except OSError:  # a network that is slow or not there: torch has more patience, and says more
            return


def side_group(timeout_s: float = TIMEOUT_S) -> SideGroup:
    """A gloo group of all ranks beside the main one, so that a background thread can talk while training goes on; None
    in a world of one. Every rank must ask for it at the same point."""
    if not torch_dist.is_initialized():
        return None
    return torch_dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def lost_rank(error: Exception) -> str | None:
    """What an exception out of a collective says about the other ranks; None when it is about something else."""
    text = str(error)
    if not isinstance(error, torch_dist.DistError) and not (isinstance(error, RuntimeError) and "/gloo/" in text):
        return None
    if "imed out" in text or "imeout" in text:
        return "another rank did not answer within dist.timeout_s"
    return "another rank has ended or cannot be reached"


def stop() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def barrier() -> None:
    if torch_dist.is_initialized():
        torch_dist.barrier()


def broadcast_object(value: object, group: SideGroup = None) -> object:
    """Rank 0's value on every rank. group: the main one, or a `side_group`."""
    if not torch_dist.is_initialized():
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0, group=group)
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


def sum_value(value: float) -> float:
    """The float64 sum over the ranks."""
    if not torch_dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    torch_dist.all_reduce(tensor)
    return tensor.item()


@functools.cache
def mesh(device_type: str, replicas: int) -> DeviceMesh:
    """The ranks as `replicas` rows, each of which shards one copy of the model (HSDP); one row: a plain line.
    The same object each time, as FSDP2 asks for it."""
    shards = world_size() // replicas
    if replicas == 1:
        return init_device_mesh(device_type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, shards), mesh_dim_names=("replica", "shard"))


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum `.grad` of every parameter over the ranks. Losses are already divided by global counts: no averaging."""
    if not torch_dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is not None:
            torch_dist.all_reduce(parameter.grad)


def gather_objects(value: object, group: SideGroup = None) -> list:
    """Every rank's value, in rank order, on every rank. group: the main one, or a `side_group`."""
    if not torch_dist.is_initialized():
        return [value]
    gathered: list = [None] * world_size()
    torch_dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_rows(rows: Tensor, shape: Sequence[int], held: Sequence[tuple[int, int]]) -> Tensor | None:
    """A tensor of `shape` on rank 0, from the rows that the ranks hold; None on the others.

    rows: this rank's, in CPU memory. held: (first row, number of rows) of every rank; what several ranks hold, the
    lowest of them sends.
    """
    senders, next_row = [], 0
    for sender, (start, count) in sorted(enumerate(held), key=lambda item: (item[1][0], item[0])):
        if start == next_row and count:
            senders.append((sender, start, count))
            next_row += count
    assert next_row == shape[0], f"{next_row} of {shape[0]} rows are held"
    if senders == [(0, 0, shape[0])]:
        return rows if is_main() else None
    whole = torch.empty(*shape, dtype=rows.dtype) if is_main() else None
    for sender, start, count in senders:
        if whole is not None and sender == 0:
            whole[start : start + count] = rows
        elif whole is not None:
            torch_dist.recv(whole[start : start + count], src=sender)
        elif sender == rank():
            torch_dist.send(rows.contiguous(), dst=0)
    return whole


def first_failure(message: str | None, group: SideGroup = None) -> str | None:
    """The message of the lowest rank that has one; None when no rank has. So all ranks stop together."""
    return next((text for text in gather_objects(message, group) if text is not None), None)


def any_rank(flag: bool) -> bool:
    """Is it so on at least one rank?"""
    return any(gather_objects(flag))
