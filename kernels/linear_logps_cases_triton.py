"""What `kernels.compile_report` compiles of `linear_logps`: every kernel, both sources, at the heads of real models.

Arguments, tiles and warps are those of `linear_logps_triton`'s launches. Not here: compiling, or what must come of it.
Letters: N rows, D width, V vocabulary.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from triton import cdiv

from kernels import linear_logps_kernels_triton as jit
from kernels.kernel_case import KernelCase
from kernels.linear_logps_plan import (
    AMD_TILES,
    DESCRIPTOR_TILES,
    GIVEN_ROWS,
    GIVEN_STAGES,
    GIVEN_WARPS,
    GROUP,
    NARROW_DESCRIPTOR_TILES,
    POINTER_TILES,
    SLAB,
)

OPTIONAL = ("bias", "softcap", "weighted", "kept")
HEADS = ((576, 49152, ()), (2048, 128256, ("kept", "bias")), (4096, 151936, ()), (2304, 262144, OPTIONAL))
"""(D, V) of SmolLM2 135M, Llama 3.2 1B, Qwen3 8B and Gemma 2 2B, and which optional arguments are there."""

ROWS = 8192

POINTERS = {
    "bias": "*bf16", "targets": "*i32", "maxima": "*fp32", "others": "*fp32", "weighted": "*fp32",
    "target_logits": "*fp32", "kept": "*bf16", "centers": "*fp32", "log_sums": "*fp32", "target_factors": "*fp32",
    "grads": "*fp32", "by_logits": "*bf16", "hidden": "*bf16", "weight": "*bf16", "products": "*fp32",
}  # fmt: skip
NUMBERS = {
    "kept_stride": "i32", "by_logits_stride": "i32", "products_stride": "i32", "first_column": "i32",
    "N": "i32", "V": "i32", "D": "i32", "scale": "fp32", "softcap": "fp32",
}  # fmt: skip


def compile_cases() -> list[KernelCase]:
    """Every kernel in bfloat16 at `HEADS`: a forward takes the whole vocabulary, a backward one slab of it."""
    return [*chain.from_iterable(_gemm_cases(*head) for head in HEADS), *_given_cases()]


def _gemm_cases(width: int, vocabulary: int, options: tuple[str, ...]) -> Iterator[KernelCase]:
    wide = NARROW_DESCRIPTOR_TILES if "softcap" in options or "weighted" in options else DESCRIPTOR_TILES
    for targets, tiles, by_descriptors in (
        (("sm_80",), POINTER_TILES, False),
        (("gfx942",), AMD_TILES, False),
        (("sm_90", "sm_100"), wide, True),
    ):
        constexprs = {
            "BLOCK_N": tiles.rows, "BLOCK_V": tiles.columns, "BLOCK_D": tiles.width, "GROUP": GROUP,
            "WHOLE_STEPS": width % tiles.width == 0, "DESCRIPTORS": by_descriptors,
        }  # fmt: skip
        types = {}
        if by_descriptors:
            types["hidden"] = f"tensordesc<bf16[{tiles.rows}, {tiles.width}]>"
            types["weight"] = f"tensordesc<bf16[{tiles.columns}, {tiles.width}]>"
        for kernel, columns in ((jit.forward_gemm, vocabulary), (jit.backward_gemm, SLAB)):
            yield KernelCase(
                **_arguments(kernel, constexprs, types, options),
                source="descriptors" if by_descriptors else "pointers",
                targets=targets,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
                shape=f"N{ROWS} D{width} V{columns}",
                flops=2.0 * ROWS * width * columns,
                bytes_moved=2.0 * (ROWS + columns) * width + _written(kernel, columns, tiles.columns, options),
                is_gemm=True,
                over_2_gib=("kept",) if 2 * ROWS * columns >= 2**31 else (),
            )


def _given_cases() -> Iterator[KernelCase]:
    """The kernels that read logits, a slab at a time, in tiles as wide as each chip's products have."""
    for targets, tiles in ((("sm_80", "gfx942"), POINTER_TILES), (("sm_90", "sm_100"), DESCRIPTOR_TILES)):
        constexprs = {"BLOCK_N": GIVEN_ROWS, "BLOCK_V": tiles.columns}
        for kernel, options, products in (
            (jit.forward_given, (), "*fp32"),
            (jit.forward_given, OPTIONAL, "*fp32"),
            (jit.backward_given, (), "*fp32"),
            (jit.backward_given, ("bias", "softcap"), "*fp32"),
            (jit.backward_given, ("softcap", "maxima"), "*bf16"),  # from what the forward kept
        ):
            size = 4 if products == "*fp32" else 2
            yield KernelCase(
                **_arguments(kernel, constexprs, {"products": products}, options),
                source="pointers",
                targets=targets,
                num_warps=GIVEN_WARPS,
                num_stages=GIVEN_STAGES,
                shape=f"N{ROWS} V{SLAB}",
                flops=10.0 * ROWS * SLAB,  # about that many for an exponential and what goes with it
                bytes_moved=size * ROWS * SLAB + _written(kernel, SLAB, tiles.columns, options),
                is_gemm=False,
            )


def _arguments(
    kernel: Any, constexprs: dict[str, Any], types: dict[str, str], options: tuple[str, ...]
) -> dict[str, Any]:
    """The fields of a case that follow from the kernel's arguments: those in OPTIONAL are None unless in `options`."""
    names = kernel.arg_names
    optional = (*OPTIONAL, "maxima") if kernel is jit.backward_given else OPTIONAL
    absent = {name: None for name in names if name in optional and name not in options}
    signature = {
        name: (POINTERS | NUMBERS | types)[name] for name in names if name not in absent and name not in constexprs
    }
    return {
        "operator": "linear_logps",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs | absent,
        # N counts scored tokens: any number
        "divisible_by_16": tuple(
            n for n, kind in signature.items() if kind.startswith("*") or kind == "i32" and n != "N"
        ),
        "dtype": "bf16",
    }


def _written(kernel: Any, columns: int, tile_columns: int, options: tuple[str, ...]) -> float:
    """Bytes of the outputs for so many columns."""
    if kernel in (jit.backward_gemm, jit.backward_given):
        return 2.0 * ROWS * columns
    sums = 2 + ("weighted" in options)
    return 4.0 * sums * ROWS * cdiv(columns, tile_columns) + 2.0 * ROWS * columns * ("kept" in options)
