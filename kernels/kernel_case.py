"""What `kernels.compile_report` needs to know of a Triton kernel to compile it for a GPU that is not here.

Every `kernels/<operator>_triton.py` has a function `compile_cases() -> list[KernelCase]` that names each of its kernels
at realistic shapes, with the tiles and warps that its launcher would choose there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100 and H200, B200, MI300."""


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel at one shape, for the targets that run this source of it."""

    operator: str
    """As in `kernels/<operator>.py`."""
    kernel: Any
    """The function under `@triton.jit`."""
    source: str
    """"pointers" or "descriptors" (tensor descriptors, TMA)."""
    targets: tuple[str, ...]
    """Of `TARGETS`."""
    signature: Mapping[str, str]
    """Argument -> Triton's type ("*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>"); constexpr arguments left out."""
    constexprs: Mapping[str, Any]
    divisible_by_16: tuple[str, ...]
    """Arguments whose address or value is a multiple of 16, as Triton would find at a launch with this shape."""
    num_warps: int
    num_stages: int
    shape: str
    """For people: "N8192 D2048 V128256"."""
    dtype: str
    """Of the large tensors: "bf16"."""
    flops: float
    """Floating-point operations of one launch."""
    bytes_moved: float
    """Bytes that one launch has to read and write at least."""
    is_gemm: bool
    """Must use tensor cores."""
    over_2_gib: tuple[str, ...] = ()
    """Pointers to tensors of 2 GiB or more: on AMD, Triton uses 32-bit buffer instructions for smaller ones."""
