"""SwiGLU and GeGLU by Triton, elementwise: act(gate) * up forward, both gradients and the product again backward.

Both activations are gate * sigmoid(z): z = gate for silu, and z = 2 sqrt(2 / pi) (gate + 0.044715 gate^3) for the tanh
form of gelu, because (1 + tanh(y)) / 2 = sigmoid(2 y). The matrix products around it are torch's. Computed in float32,
rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kernel_case import KernelCase
from kernels.pointer_kernels import check_dtype, pointer_case

BLOCK = 2048
WARPS = 4
"""512 numbers a warp: 16 bytes a thread in bfloat16 on an AMD GPU. Not measured on a GPU."""


@triton.jit
def _sigmoids_and_slope(gate, GELU: tl.constexpr):
    """sigmoid(z), sigmoid(-z) and d z / d gate."""
    if GELU:
        z = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    else:
        z = gate
        slope = 1.0
    # by exp(-|z|), which cannot overflow; and 1 - sigmoid(z) would lose what is left of a small sigmoid(-z)
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, small) / (1.0 + small), tl.where(z >= 0, small, 1.0) / (1.0 + small), slope


@triton.jit
def multiply(
    gate,
    up,
    out,
    number,  # of elements
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < number
    g = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    sigmoid, _, _ = _sigmoids_and_slope(g, GELU)
    tl.store(out + places, (g * sigmoid * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def differentiate(
    gate,
    up,
    grad,  # by the product
    by_gate,
    by_up,
    product,  # output: act(gate) * up, or None
    number,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < number
    g = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    sigmoid, other, slope = _sigmoids_and_slope(g, GELU)
    active = g * sigmoid
    dtype = by_gate.dtype.element_ty
    tl.store(by_gate + places, (d * u * (sigmoid + active * other * slope)).to(dtype), mask=inside)
    tl.store(by_up + places, (d * active).to(dtype), mask=inside)
    if product is not None:
        tl.store(product + places, (active * u).to(dtype), mask=inside)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up in the inputs' shape and dtype. Raises ValueError for a dtype without a kernel."""
    check_dtype("swiglu_linear", gate.dtype)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        multiply[triton.cdiv(gate.numel(), BLOCK),](
            gate, up, out, gate.numel(), GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=WARPS
        )
    return out


def backward(
    gate: Tensor, up: Tensor, grad: Tensor, activation: str, with_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients by gate and up, and act(gate) * up where it is asked for; `grad` is by that product."""
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    by_gate, by_up = torch.empty_like(gate), torch.empty_like(gate)
    product = torch.empty_like(gate) if with_product else None
    if gate.numel():
        differentiate[triton.cdiv(gate.numel(), BLOCK),](
            gate, up, grad, by_gate, by_up, product, gate.numel(),
            GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return by_gate, by_up, product


def compile_cases() -> list[KernelCase]:
    """Both kernels with both activations; the width does not matter to them. F of SmolLM2 135M and Llama 3 8B."""
    cases = []
    for inner, gelu in ((1536, True), (14336, False)):
        for kernel, tensors in ((multiply, 3), (differentiate, 6)):
            cases.append(
                pointer_case(
                    "swiglu_linear",
                    kernel,
                    f"T8192 F{inner} " + ("gelu" if gelu else "silu"),
                    constexprs={"GELU": gelu, "BLOCK": BLOCK},
                    types={"number": "i32"},
                    num_warps=WARPS,
                    numbers=8192 * inner,
                    bf16_tensors=tensors,
                )
            )
    return cases
