"""RMSNorm by Triton, with the addition in front of it or without: one pass forward, one backward.

A program holds whole rows in registers: widths to 8192. The gradient by the weight is summed up by each program over
the rows it takes, and over programs by one sum in a fixed order: no atomics, repeats are equal bit for bit.
Letters: R rows, D width. A tile is BLOCK_R rows by BLOCK_D >= D columns. Statistics and sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kernel_case import KernelCase
from kernels.pointer_kernels import check_dtype, pointer_case

LARGEST_WIDTH = 8192
TILE = 4096
"""Numbers in a tile, unless a row has more; 512 of them a warp: 16 bytes a thread in bfloat16 on an AMD GPU."""
BACKWARD_PROGRAMS = 512
"""At most so many, each with a row of partial sums: 8 MiB at width 4096. Not measured on a GPU."""


@triton.jit
def forward_rows(
    x,  # (R, D)
    residual,  # (R, D) or None
    weight,  # (D,)
    total,  # (R, D) output: x + residual; None where residual is
    normed,  # (R, D) output
    scale,  # (R,) output, float32: 1 / sqrt(mean(total^2) + eps)
    eps,
    R,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    places = rows.to(tl.int64)[:, None] * D + columns[None, :]
    inside = (rows < R)[:, None] & (columns < D)[None, :]
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        added = values + tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        rounded = added.to(normed.dtype.element_ty)  # the norm is that of the sum as the next layers see it
        tl.store(total + places, rounded, mask=inside)
        values = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=1) / D + eps)
    tl.store(scale + rows, factor, mask=rows < R)
    # rounded before the product with the weight, as Llama checkpoints expect it
    unit = (values * factor[:, None]).to(normed.dtype.element_ty).to(tl.float32)
    by_column = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(normed + places, (unit * by_column[None, :]).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def backward_rows(
    total,  # (R, D)
    weight,  # (D,)
    scale,  # (R,) as forward_rows wrote it
    grad,  # (R, D) by normed
    grad_total,  # (R, D) by total, or None
    by_total,  # (R, D) output: the sum of both ways
    by_weight,  # (programs, D) output, float32: sums over a program's rows; or None
    R,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With n = total * scale, g = grad * weight: scale * (g - n * mean(g * n)), and the sum of grad * n over rows."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_D)
    by_column = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tile in range(program, tl.cdiv(R, BLOCK_R), programs):
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        places = rows.to(tl.int64)[:, None] * D + columns[None, :]
        inside = (rows < R)[:, None] & (columns < D)[None, :]
        factor = tl.load(scale + rows, mask=rows < R, other=0.0)[:, None]
        unit = tl.load(total + places, mask=inside, other=0.0).to(tl.float32) * factor
        upstream = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        if by_weight is not None:
            sums += upstream * unit
        weighted = upstream * by_column[None, :]
        mean = tl.sum(weighted * unit, axis=1) / D
        result = factor * (weighted - unit * mean[:, None])
        if grad_total is not None:
            result += tl.load(grad_total + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(by_total + places, result.to(by_total.dtype.element_ty), mask=inside)
    if by_weight is not None:
        tl.store(by_weight + program * D + columns, tl.sum(sums, axis=0), mask=columns < D)


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(..., D), (..., D) or None, (D,) -> total, normed (..., D) and scale (R,) float32.

    Raises ValueError for a dtype or a width without a kernel.
    """
    _check(x, weight)
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    rows, width = x.numel() // len(weight), len(weight)
    total = x if residual is None else torch.empty_like(x)
    normed, scale = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    if rows:
        block_rows, block_width, warps = tile_of(width)
        forward_rows[triton.cdiv(rows, block_rows),](
            x, residual, weight, None if residual is None else total, normed, scale, eps, rows, width,
            BLOCK_R=block_rows, BLOCK_D=block_width, num_warps=warps,
        )  # fmt: skip
    return total, normed, scale


def backward(
    total: Tensor, weight: Tensor, scale: Tensor, grad: Tensor, grad_total: Tensor | None, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients by total (from both ways) and, where asked for, by weight; arguments as `forward` returned them."""
    total, weight, grad = total.contiguous(), weight.contiguous(), grad.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    rows, width = len(scale), len(weight)
    block_rows, block_width, warps = tile_of(width)
    programs = min(triton.cdiv(rows, block_rows), BACKWARD_PROGRAMS)
    by_total = torch.empty_like(total)
    sums = weight.new_empty(programs, width, dtype=torch.float32) if with_weight else None
    if rows:
        backward_rows[programs,](
            total, weight, scale, grad, grad_total, by_total, sums, rows, width,
            BLOCK_R=block_rows, BLOCK_D=block_width, num_warps=warps,
        )  # fmt: skip
    return by_total, None if sums is None else sums.sum(0).to(weight.dtype)


def tile_of(width: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_D, warps) for rows of this width."""
    block_width = triton.next_power_of_2(width)
    numbers = max(block_width, TILE)
    return numbers // block_width, block_width, numbers // 512


def _check(x: Tensor, weight: Tensor) -> None:
    check_dtype("rms_norm", x.dtype)
    if len(weight) > LARGEST_WIDTH:
        raise ValueError(
            f"rms_norm: the Triton kernels take widths to {LARGEST_WIDTH}, not {len(weight)}; use impl='cpu'"
        )


def compile_cases() -> list[KernelCase]:
    """Both kernels with all arguments at several widths, and at one width without the optional ones."""
    types = {"scale": "*fp32", "by_weight": "*fp32", "eps": "fp32", "R": "i32", "D": "i32"}
    rows = 8192
    cases = []
    for width, optional in ((576, True), (2048, False), (4096, True), (LARGEST_WIDTH, True)):
        block_rows, block_width, warps = tile_of(width)
        for kernel, absent in ((forward_rows, ("residual", "total")), (backward_rows, ("grad_total", "by_weight"))):
            tensors = 4 if optional else 2 if kernel is forward_rows else 3
            cases.append(
                pointer_case(
                    "rms_norm",
                    kernel,
                    f"R{rows} D{width}" + ("" if optional else " bare"),
                    constexprs={
                        "BLOCK_R": block_rows,
                        "BLOCK_D": block_width,
                        **({} if optional else dict.fromkeys(absent)),
                    },
                    types=types,
                    num_warps=warps,
                    numbers=rows * width,
                    bf16_tensors=tensors,
                )
            )
    return cases
