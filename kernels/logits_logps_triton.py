"""Log-probabilities from given logits by Triton: one pass over the logits forward, one backward, which may be in place.

Forward, a program takes a row through its columns with a running maximum (online softmax, Milakov and Gimelshein 2018);
backward, a program takes one tile of a row. Every number is written by one program: nothing depends on their order.
Letters: N rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kernel_case import KernelCase
from kernels.pointer_kernels import check_dtype, pointer_case

BLOCK = 4096
WARPS = 8
"""512 numbers a warp: 16 bytes a thread in bfloat16 on an AMD GPU. Not measured on a GPU."""


@triton.jit
def sum_rows(
    logits,  # (N, V)
    stride,  # between rows
    targets,  # (N,) int64
    centers,  # (N,) output, as all others float32: the largest logit
    others,  # (N,) output: sum of exp(logit - center) without the target
    gaps,  # (N,) output: target logit - center
    V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    values = logits + row * stride
    top = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logit = tl.load(values + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(logit, axis=0))
        # as long as all is -inf there is nothing to subtract: -inf - -inf would make it nan
        center = tl.where(higher == float("-inf"), 0.0, higher)
        exps = tl.where(columns == target, 0.0, tl.exp(logit - center))
        sums = sums * tl.exp(top - center) + exps
        top = higher
    tl.store(centers + row, top)
    tl.store(others + row, tl.sum(sums, axis=0))
    tl.store(gaps + row, tl.load(values + target).to(tl.float32) - top)


@triton.jit
def differentiate_tile(
    logits,  # (N, V)
    stride,
    targets,  # (N,) int64
    centers,  # (N,) as all others float32: exp(logit - center - log_sum) is a probability
    log_sums,  # (N,)
    by_target,  # (N,) the gradient by the target's logit
    grad,  # (N,) upstream
    out,  # (N, V) output, may be `logits`: a program reads its tile before it writes it
    out_stride,
    V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + row * stride + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    # one after the other: their sum would round away log_sum where logits are large
    probability = tl.exp(logit - tl.load(centers + row) - tl.load(log_sums + row))
    is_target = columns == tl.load(targets + row)
    result = tl.where(is_target, tl.load(by_target + row), -tl.load(grad + row) * probability)
    tl.store(out + row * out_stride + columns, result.to(out.dtype.element_ty), mask=columns < V)


def forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, V) with contiguous rows, (N,) int64 -> centers, others, gaps, each (N,) float32; see the kernel.

    Raises ValueError for a dtype without a kernel.
    """
    check_dtype("logps_from_logits", logits.dtype)
    rows, columns = logits.shape
    centers, others, gaps = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if rows:
        sum_rows[rows,](
            logits, logits.stride(0), targets.contiguous(), centers, others, gaps, columns, BLOCK=BLOCK, num_warps=WARPS
        )
    return centers, others, gaps


def backward(
    logits: Tensor,
    targets: Tensor,
    centers: Tensor,
    log_sums: Tensor,
    by_target: Tensor,
    grad: Tensor,
    out: Tensor,
) -> None:
    """Write the gradient by `logits` into `out` (N, V) with contiguous rows; arguments as in the kernel."""
    rows, columns = logits.shape
    if rows:
        differentiate_tile[rows, triton.cdiv(columns, BLOCK)](
            logits, logits.stride(0), targets.contiguous(), centers, log_sums, by_target, grad.contiguous(),
            out, out.stride(0), columns, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def compile_cases() -> list[KernelCase]:
    """Both kernels at 8192 rows of the smallest and the largest vocabulary; that one fills 4 GiB."""
    vectors = dict.fromkeys(("centers", "others", "gaps", "log_sums", "by_target", "grad"), "*fp32")
    types = {**vectors, "targets": "*i64", "stride": "i32", "out_stride": "i32", "V": "i32"}
    cases = []
    for vocabulary in (32000, 262144):
        large = ("logits", "out") if vocabulary == 262144 else ()
        for kernel, tensors in ((sum_rows, 1), (differentiate_tile, 2)):
            cases.append(
                pointer_case(
                    "logits_logps",
                    kernel,
                    f"N8192 V{vocabulary}",
                    constexprs={"BLOCK": BLOCK},
                    types=types,
                    num_warps=WARPS,
                    numbers=8192 * vocabulary,
                    bf16_tensors=tensors,
                    over_2_gib=large[:tensors],
                )
            )
    return cases
