"""Small Triton kernels, good and bad on purpose, for the tests of `kernels.compile_report`.

Not a test. `test_kernel_compile_report.py` copies this file beside the report as `kernels/samples_triton.py` in a
folder of its own and runs the report there.
"""

import os
from typing import Any

import triton
import triton.language as tl

from kernels.kernel_case import TARGETS, KernelCase


@triton.jit
def product(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a @ b.T: (M, K), (N, K) -> (M, N), with IEEE float32 products where the inputs are float32."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        inside = (start + inner)[None, :] < K
        left = tl.load(a + rows[:, None] * K + (start + inner)[None, :], mask=(rows < M)[:, None] & inside, other=0.0)
        right = tl.load(
            b + columns[:, None] * K + (start + inner)[None, :], mask=(columns < N)[:, None] & inside, other=0.0
        )
        total = tl.dot(left, right.T, total, input_precision="ieee")
    place = c + rows[:, None] * N + columns[None, :]
    tl.store(place, total.to(c.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def product_by_descriptors(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    total = tl.zeros((BM, BN), dtype=tl.float32)
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    for start in range(0, K, BK):
        total = tl.dot(a.load([row, start]), b.load([column, start]).T, total)
    c.store([row, column], total.to(tl.bfloat16))


@triton.jit
def helper(x, D, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    values = tl.load(x + tl.program_id(0) * D + column, mask=column < D, other=0.0)
    return tl.sum(values.to(tl.float32))


@triton.jit
def row_sums(x, out, D, BLOCK: tl.constexpr):
    tl.store(out + tl.program_id(0), helper(x, D, BLOCK))


@triton.jit
def sum_by_atomics(x, out, D, BLOCK: tl.constexpr):
    tl.atomic_add(out, helper(x, D, BLOCK))


@triton.jit
def without_case(x, out, D, BLOCK: tl.constexpr):
    """Like `row_sums`."""
    tl.store(out, helper(x, D, BLOCK))


@triton.jit
def wrong_types(x, out, D, BLOCK: tl.constexpr):
    tl.store(out, tl.dot(tl.zeros((BLOCK, 16), tl.float32), tl.zeros((32, BLOCK), tl.float32)))


PRODUCT: dict[str, Any] = {
    "kernel": product,
    "source": "pointers",
    "constexprs": {"BM": 128, "BN": 128, "BK": 64},
    "divisible_by_16": ("a", "b", "c", "M", "N", "K"),
    "num_warps": 8,
    "num_stages": 3,
    "shape": "M4096 N4096 K1024",
    "flops": 2.0 * 4096 * 4096 * 1024,
    "bytes_moved": 2.0 * (2 * 4096 * 1024 + 4096 * 4096),
    "is_gemm": True,
}
ROWS: dict[str, Any] = {
    "source": "pointers",
    "targets": TARGETS,
    "signature": {"x": "*bf16", "out": "*fp32", "D": "i32"},
    "constexprs": {"BLOCK": 1024},
    "divisible_by_16": ("x", "out", "D"),
    "num_warps": 4,
    "num_stages": 1,
    "shape": "R8192 D1024",
    "flops": 8192.0 * 1024,
    "bytes_moved": 8192 * (2.0 * 1024 + 4),
    "is_gemm": False,
}


def products(dtype: str = "bf16", **changes: Any) -> KernelCase:
    pointers = {name: f"*{dtype}" for name in "abc"}
    numbers = {name: "i32" for name in "MNK"}
    return KernelCase(dtype=dtype, **{**PRODUCT, "signature": pointers | numbers, **changes})


def sums(operator: str, kernel: Any, **changes: Any) -> KernelCase:
    return KernelCase(operator=operator, kernel=kernel, dtype="bf16", **{**ROWS, **changes})


def descriptors(operator: str, **changes: Any) -> KernelCase:
    blocks = {"a": (128, 64), "b": (256, 64), "c": (128, 256)}
    types = {name: f"tensordesc<bf16[{rows}, {columns}]>" for name, (rows, columns) in blocks.items()}
    tiles = {"BM": 128, "BN": 256, "BK": 64}
    signature = types | {name: "i32" for name in "MNK"}
    settings = {"kernel": product_by_descriptors, "source": "descriptors", "signature": signature, "constexprs": tiles}
    return products(operator=operator, **{**settings, "divisible_by_16": ("M", "N", "K"), **changes})


class EndsTheProcess:
    """Stands for a kernel on which LLVM aborts: the process ends in the middle of the compile."""

    __name__ = "ends_the_process"

    @property
    def arg_names(self) -> list[str]:
        os._exit(41)


def compile_cases() -> list[KernelCase]:
    """The operator of a case is the name that the tests know it by."""
    few: dict[str, Any] = {"constexprs": {"BLOCK": 1024}, "targets": ("sm_90",)}
    large_tiles = {"BM": 128, "BN": 256, "BK": 32}
    return [
        products(operator="good", targets=("sm_80", "sm_90", "sm_100", "gfx942"), num_stages=2),
        products(operator="good", targets=("sm_80",), num_stages=2, shape="M8192 N8192 K1024"),
        descriptors("good", targets=("sm_90", "sm_100")),
        sums("good", row_sums, num_warps=2),
        products(operator="spills", targets=("sm_80",), constexprs=large_tiles, num_warps=4),
        products(operator="spills", targets=("gfx942",), constexprs=large_tiles | {"BM": 256}, num_warps=4),
        products(operator="no attributes", targets=("sm_80", "gfx942"), divisible_by_16=()),
        products("fp32", operator="float32", targets=("sm_80",), constexprs={"BM": 64, "BN": 64, "BK": 32}),
        products(operator="shared memory", targets=("sm_80", "gfx942"), num_stages=7),
        descriptors("shared memory", targets=("sm_90",), num_stages=6),
        descriptors("serialised", targets=("sm_90",), num_warps=4),
        sums("atomics", sum_by_atomics, targets=("sm_90", "gfx942"), num_warps=2),
        sums("narrow", row_sums, targets=("sm_90", "gfx942"), divisible_by_16=()),
        sums("wrong types", wrong_types, **few),
        sums("dies", EndsTheProcess(), **few),
        sums("incomplete", row_sums, **{**few, "signature": {"x": "*bf16", "D": "i32"}}),
    ]
