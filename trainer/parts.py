"""The rows of a tensor that this rank holds: what checkpoints and exports read and write.

An unsharded tensor is one part that starts at row 0. FSDP2 shards by rows (dimension 0): a part is always whole rows.
A sharded tensor (torch.distributed.tensor.DTensor) is told by its `to_local`: importing its class takes 0.6 s.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Rows [start, start + len(tensor)) of the tensor `name`, whose whole shape is `shape`. The tensor is this rank's
    own memory, not a copy; it may have no rows."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    start: int


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def part_of(name: str, tensor: Tensor) -> Part:
    """`tensor` as a part, sharded by rows or whole."""
    own = local(tensor).detach()
    if not is_sharded(tensor):
        return Part(name, own, tuple(own.shape), 0)
    mesh = tensor.device_mesh
    dimension = mesh.ndim - 1  # with replicas, the first dimension of the mesh counts them
    rows_each = -(-len(tensor) // mesh.size(dimension))  # as torch.chunk cuts
    start = min(rows_each * mesh.get_local_rank(dimension), len(tensor))
    return Part(name, own, tuple(tensor.shape), start)


def parts_of(named: Iterable[tuple[str, Tensor]]) -> list[Part]:
    return [part_of(name, tensor) for name, tensor in named]
