"""What the Triton operators without a matrix product share: which dtypes they take, and how a compile case is made.

Not here: kernels, launches, or anything of `linear_logps`. Imports no Triton.
"""

from collections.abc import Mapping
from typing import Any

import torch

from kernels.kernel_case import TARGETS, KernelCase

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

OPERATIONS_A_NUMBER = 10.0
"""Roughly, with an exponential: far below what a GPU does in the time it reads the number."""


def check_dtype(operator: str, dtype: torch.dtype) -> None:
    """Raises ValueError, which names the way out, for what the kernels do not compute in, such as float64."""
    if dtype not in DTYPES:
        names = ", ".join(str(known) for known in DTYPES)
        raise ValueError(f"{operator}: the Triton kernels take {names}, not {dtype}; use impl='cpu'")


def pointer_case(
    operator: str,
    kernel: Any,
    shape: str,
    *,
    constexprs: Mapping[str, Any],
    types: Mapping[str, str],
    num_warps: int,
    numbers: int,
    bf16_tensors: int,
    over_2_gib: tuple[str, ...] = (),
) -> KernelCase:
    """A case in bfloat16 for all targets. Every argument that is in neither `constexprs` nor `types` is a "*bf16".

    numbers: of one large tensor. bf16_tensors: how many of that size are read or written.
    """
    signature = {name: types.get(name, "*bf16") for name in kernel.arg_names if name not in constexprs}
    return KernelCase(
        operator=operator,
        kernel=kernel,
        source="pointers",
        targets=TARGETS,
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=tuple(name for name, kind in signature.items() if kind.startswith(("*", "i"))),
        num_warps=num_warps,
        num_stages=3,
        shape=shape,
        dtype="bf16",
        flops=OPERATIONS_A_NUMBER * numbers,
        bytes_moved=2.0 * bf16_tensors * numbers,
        is_gemm=False,
        over_2_gib=over_2_gib,
    )
