"""How one call of the Triton `linear_logps` computes: tiles, sources and slabs, chosen by the device and the dtype.

Choices come from a table, not from timing: a measured choice could differ from run to run. Not here: kernels, launches.
Not measured on any GPU yet; where only a reading can decide, that is said.
Letters: N rows, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.head import HeadOptions

DEFAULTS = HeadOptions()

GROUP = 16
"""Row tiles that share a walk over the weight: 16 of 128 rows at D 4096 are 16 MiB, which stay in a GPU's L2 cache."""

SLAB = 8192
"""Columns of a slab, in which the backward goes through the vocabulary."""

GIVEN_ROWS, GIVEN_WARPS, GIVEN_STAGES = 32, 8, 1
"""Rows of a tile, and how it is computed, in the kernels that read logits from memory."""


@dataclass(frozen=True)
class Tiles:
    """The tile of logits a program computes, and how."""

    rows: int
    columns: int
    width: int
    """Step of the product over D."""
    warps: int
    stages: int


# For 16-bit inputs, the largest without spills and within shared memory (`python -m kernels.compile_report`).
POINTER_TILES = Tiles(128, 128, 64, warps=8, stages=3)
AMD_TILES = Tiles(128, 128, 64, warps=8, stages=2)
DESCRIPTOR_TILES = Tiles(128, 256, 64, warps=8, stages=3)
NARROW_DESCRIPTOR_TILES = Tiles(128, 128, 64, warps=8, stages=4)
"""For softcap and entropy, with which the wide ones spill."""
FLOAT32_TILES = Tiles(64, 64, 16, warps=4, stages=2)
"""For either source. Exact, so without tensor cores; not made for speed."""


@dataclass(frozen=True)
class Plan:
    """How one call computes: which of equivalent programs, and in what pieces."""

    backend: str
    """Who multiplies `hidden` by `weight`: "fused" (the kernels) or "vendor" (the vendor's library, a slab at a time,
    into float32 logits that the kernels then read)."""
    source: str
    """How the fused kernels read: "pointers" or "descriptors" (Hopper's and Blackwell's copy engine)."""
    tiles: Tiles
    slab: int
    """Columns of a slab, a multiple of tiles.columns. N * slab numbers are in memory at a time."""


def choose_plan(
    hidden: Tensor,
    *,
    options: HeadOptions = DEFAULTS,
    backend: str = "fused",
    source: str = "auto",
    tiles: Tiles | None = None,
    slab: int = SLAB,
) -> Plan:
    """The plan for `options` and inputs like `hidden` (N, D) on its device; the other keywords force a part of it.

    "fused" is the default because it keeps no logits; which is faster on which GPU has not been measured. Raises
    ValueError for what the kernels cannot do.
    """
    row_bytes = hidden.shape[1] * hidden.element_size()
    if source == "auto":
        by_engine = _has_copy_engine(hidden.device) and hidden.element_size() == 2 and row_bytes % 16 == 0
        source = "descriptors" if by_engine else "pointers"
    if backend not in ("fused", "vendor") or source not in ("pointers", "descriptors"):
        raise ValueError(
            f"linear_logps: backend {backend!r} must be 'fused' or 'vendor', source {source!r} 'auto', 'pointers' or "
            "'descriptors'"
        )
    if source == "descriptors" and row_bytes % 16:
        raise ValueError(
            f"linear_logps: source 'descriptors' needs rows of a multiple of 16 bytes, D {hidden.shape[1]} in "
            f"{hidden.dtype} has {row_bytes}; use source 'pointers'"
        )
    tiles = tiles or _tiles(hidden, source, options)
    if slab % tiles.columns:
        raise ValueError(f"linear_logps: slab {slab} is not a multiple of the tiles' {tiles.columns} columns")
    return Plan(backend, source, tiles, slab)


def _tiles(hidden: Tensor, source: str, options: HeadOptions) -> Tiles:
    if hidden.dtype == torch.float32:
        return FLOAT32_TILES
    if source == "descriptors":
        needs_registers = options.softcap is not None or options.with_entropy
        return NARROW_DESCRIPTOR_TILES if needs_registers else DESCRIPTOR_TILES
    return AMD_TILES if torch.version.hip else POINTER_TILES


def _has_copy_engine(device: torch.device) -> bool:
    """Hopper or a data center's Blackwell; other Blackwells have less shared memory than the tiles for it need."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] in (9, 10)
