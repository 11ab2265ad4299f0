"""Rotary position embedding by Triton: one pass, and the same one with the angles reversed for the gradient.

Letters: T tokens, H heads, h head width; a row is one head of one token. Computed in float32, rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kernel_case import KernelCase
from kernels.pointer_kernels import check_dtype, pointer_case

TILE = 2048
"""Pairs in a tile; a warp for each 512 of them. Not measured on a GPU."""


@triton.jit
def rotate_rows(
    x,  # (T, H, h)
    cos,  # (T, h / 2) float32
    sin,  # (T, h / 2) float32
    out,  # (T, H, h)
    R,  # T * H
    H,
    HALF,  # h / 2
    BACK: tl.constexpr,  # by the reversed angles
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_H)
    inside = (rows < R)[:, None] & (columns < HALF)[None, :]
    angles = (rows // H).to(tl.int64)[:, None] * HALF + columns[None, :]
    cosine, sine = tl.load(cos + angles, mask=inside, other=0.0), tl.load(sin + angles, mask=inside, other=0.0)
    if BACK:
        sine = -sine
    firsts = rows.to(tl.int64)[:, None] * (2 * HALF) + columns[None, :]
    first = tl.load(x + firsts, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + firsts + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + firsts, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + firsts + HALF, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """(T, H, h), (T, h/2), (T, h/2) -> (T, H, h). Raises ValueError for a dtype without a kernel."""
    check_dtype("apply_rope", x.dtype)
    x = x.contiguous()
    cos, sin = (table.to(torch.float32).contiguous() for table in (cos, sin))
    out = torch.empty_like(x)
    rows, half = x.shape[0] * x.shape[1], x.shape[2] // 2
    if x.numel():
        block_rows, block_half, warps = tile_of(half)
        rotate_rows[triton.cdiv(rows, block_rows),](
            x, cos, sin, out, rows, x.shape[1], half,
            BACK=back, BLOCK_R=block_rows, BLOCK_H=block_half, num_warps=warps,
        )  # fmt: skip
    return out


def tile_of(half: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_H, warps) for heads of 2 * half numbers."""
    block_half = triton.next_power_of_2(half)
    numbers = max(block_half, TILE)
    return numbers // block_half, block_half, TILE // 512


def compile_cases() -> list[KernelCase]:
    """Both directions, 8192 tokens of 32 heads, at the head widths of real models."""
    rows = 8192 * 32
    types = {"cos": "*fp32", "sin": "*fp32", "R": "i32", "H": "i32", "HALF": "i32"}
    cases = []
    for width, back in ((64, False), (64, True), (128, False), (256, True)):
        block_rows, block_half, warps = tile_of(width // 2)
        cases.append(
            pointer_case(
                "rope",
                rotate_rows,
                f"T8192 H32 h{width}" + (" back" if back else ""),
                constexprs={"BACK": back, "BLOCK_R": block_rows, "BLOCK_H": block_half},
                types=types,
                num_warps=warps,
                numbers=rows * width,
                bf16_tensors=2,
            )
        )
    return cases
