"""What `kernels.bench` measures: each operator's inputs, the ways to compute it, and how much work that is.

Not here: clocks, memory, processes. Liger and cut-cross-entropy are imported where they are called, by name: nobody
needs them. Letters: N rows (tokens), D width, V vocabulary, F inner width.
"""

import importlib
import importlib.util
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch, reference
from kernels.head import HeadOptions
from kernels.linear_logps import linear_logps
from kernels.linear_logps_plan import choose_plan
from kernels.logits_logps import logps_from_logits
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope
from kernels.swiglu_linear import geglu_linear, swiglu_linear

EPS = 1e-5
Function = Callable[..., Any]
"""Inputs -> one tensor or a tuple of them."""


@dataclass(frozen=True)
class Sizes:
    rows: int
    width: int
    vocab: int

    @property
    def inner(self) -> int:
        return self.width * 8 // 3

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return 64 if self.width % 64 == 0 else self.width


@dataclass(frozen=True)
class Operator:
    make: Callable[[Sizes, torch.device], list[Tensor]]
    """Random inputs, float32 where they are not integers; the trained ones first."""
    trained: int
    by_row: tuple[int, ...]
    """Which inputs have N rows; results have N rows too."""
    plain: Function
    """The definition."""
    ours: Function
    """Takes impl=."""
    liger: Callable[[ModuleType], Function] | None
    """From its module of functions."""
    is_gemm: bool
    work: Callable[[Sizes], int]
    """FLOP of one product; where there is none, numbers that every implementation must read or write, forward and
    backward."""


@dataclass(frozen=True)
class Variant:
    """One way to an operator's results and gradients."""

    name: str
    make: Callable[[list[Tensor]], tuple[Function, str]]
    """From inputs, for what has to be tried out: the function, and a note for the reader."""
    times: int
    """How often `Operator.work` is done."""
    trained: int
    """The first so many inputs get a gradient; 0: forward only."""
    missing: str = ""
    """Why it cannot run here."""


def variants(op: str, dtype: torch.dtype, device: torch.device) -> list[Variant]:
    """All ways to `op`, those that cannot run here included."""
    operator = OPERATORS[op]
    times = 3 if operator.is_gemm else 1
    found = [
        Variant("plain", _always(operator.plain), times, operator.trained),
        Variant(
            "torch.compile",
            lambda _: (torch.compile(operator.plain), ""),
            times,
            operator.trained,
            _no_compiler(device),
        ),
    ]
    if op == "linear_logps":
        return found + _other_heads(dtype, device) + _own_heads(dtype, device)
    liger = "its rope is of queries and keys at once" if operator.liger is None else _no_package("liger_kernel", device)
    found.append(Variant("Liger", lambda _: (operator.liger(_liger()), ""), times, operator.trained, liger))
    for impl in dict.fromkeys(("cpu", dispatch.resolve("auto", device, dtype))):
        found.append(Variant(f"ours, {impl}", _always(_with_impl(operator.ours, impl)), times, operator.trained))
        if op == "logits_logps":
            in_place = _with_impl(_logps_in_place, impl)
            found.append(Variant(f"ours, {impl}, in place", _always(in_place), times, operator.trained))
    return found


def shape_words(op: str, sizes: Sizes) -> str:
    operator = OPERATORS[op]
    shapes = [tuple(tensor.shape) for tensor in operator.make(sizes, torch.device("meta"))]
    return ", ".join(map(str, shapes))


def _always(function: Function) -> Callable[[list[Tensor]], tuple[Function, str]]:
    return lambda _: (function, "")


def _with_impl(function: Function, impl: str) -> Function:
    return lambda *inputs: function(*inputs, impl=impl)


# --- linear_logps ----------------------------------------------------------------------------------------------------


def _other_heads(dtype: torch.dtype, device: torch.device) -> list[Variant]:
    """Other people's. Each computes the logits twice, so four products."""
    no_fused = "" if hasattr(F, "linear_cross_entropy") else "this PyTorch has none"
    liger, cut = _no_package("liger_kernel", device), _no_package("cut_cross_entropy", device)
    return [
        Variant("F.linear_cross_entropy", lambda _: (_chunked(), ""), 4, 2, no_fused),
        Variant("F.linear_cross_entropy, best", lambda inputs: _best_chunked(inputs, dtype), 4, 2, no_fused),
        Variant("Liger", lambda _: (_negative(_liger().liger_fused_linear_cross_entropy), ""), 4, 2, liger),
        Variant("cut-cross-entropy", lambda _: (_negative(_cut_cross_entropy()), ""), 4, 2, cut),
    ]


def _own_heads(dtype: torch.dtype, device: torch.device) -> list[Variant]:
    forms: dict[str, Callable[[bool], Function]] = {"cpu": lambda stash: _with_impl(_head(stash), "cpu")}
    if dispatch.resolve("auto", device, dtype) == "triton":
        plans = {"fused": {}, "vendor": {"backend": "vendor"}}
        if choose_plan(torch.empty(1, 64, dtype=dtype, device=device)).source == "descriptors":
            plans["pointers"] = {"source": "pointers"}  # fused too
        forms |= {name: lambda stash, plan=plan: _planned_head(stash, plan) for name, plan in plans.items()}
    ways = (("recompute", 4, 2), ("stash", 3, 2), ("frozen head", 2, 1), ("no gradient", 1, 0))
    # recompute on a CPU keeps some slabs, more the fewer rows there are: it does less than 4, and its share may pass 1
    return [
        Variant(f"{way}, {form}", lambda _, make=make, way=way: (make(way == "stash"), ""), times, trained)
        for form, make in forms.items()
        for way, times, trained in ways
    ]


def _head(stash: bool) -> Function:
    return lambda hidden, weight, targets, impl: linear_logps(hidden, weight, targets, stash=stash, impl=impl)


def _planned_head(stash: bool, plan: dict[str, str]) -> Function:
    """By Triton, in a form that the device may not choose."""
    options = HeadOptions(stash=stash)

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        chosen = choose_plan(hidden, options=options, **plan)
        return dispatch.triton_module("linear_logps").run(hidden, weight, targets, None, options, chosen).logps

    return function


def _negative(cross_entropy: Function, **options: Any) -> Function:
    return lambda hidden, weight, targets: -cross_entropy(hidden, weight, targets, reduction="none", **options)


def _chunked(**options: Any) -> Function:
    """F.linear_cross_entropy through the tokens in chunks; without options it would build the logits whole."""
    return _negative(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions(**options))


def _best_chunked(inputs: list[Tensor], dtype: torch.dtype) -> tuple[Function, str]:
    """The fastest of a few options, each tried once, forward and backward."""
    rows, on_gpu = len(inputs[0]), inputs[0].is_cuda
    policies = ["compact"]  # in float32 they differ in nothing
    if dtype != torch.float32:  # on a CPU the others multiply without its 16-bit instructions: 6 times as long
        policies = ["accurate", "balanced", "compact"] if on_gpu else ["accurate"]
    chunks = sorted({-(-rows // parts) for parts in (1, 2, 4, 8)})
    tried = {}
    for policy in policies:
        for chunk in chunks:
            function = _chunked(acc_policy=policy, batch_chunk_size=chunk, chunking_method=None)
            start = time.perf_counter()
            function(*inputs).sum().backward()
            if on_gpu:
                torch.cuda.synchronize()
            tried[time.perf_counter() - start] = function, f"{policy}, {chunk} rows at a time"
            for leaf in inputs:
                leaf.grad = None
    return tried[min(tried)]


def _linear_logps_inputs(sizes: Sizes, device: torch.device) -> list[Tensor]:
    """Logits spread like a trained model's (deviation 3, a likely token's near 20); half of the targets are likely."""
    weight = torch.randn(sizes.vocab, sizes.width, device=device) * 0.1
    targets = torch.randint(sizes.vocab, (sizes.rows,), device=device)
    others = torch.randint(sizes.vocab, (sizes.rows,), device=device)
    likely = torch.where(torch.arange(sizes.rows, device=device) % 2 == 0, targets, others)
    hidden = torch.randn(sizes.rows, sizes.width, device=device) * (30 / math.sqrt(sizes.width))
    return [hidden + weight[likely] * (2000 / sizes.width), weight, targets]


# --- the other operators ---------------------------------------------------------------------------------------------


def _logps_in_place(logits: Tensor, targets: Tensor, *, impl: str) -> Tensor:
    """The logits' memory is overwritten: what the next round finds there is the gradient, which is as good."""
    return logps_from_logits(logits.view_as(logits), targets, inplace=True, impl=impl)


def _logits_inputs(sizes: Sizes, device: torch.device) -> list[Tensor]:
    logits = torch.randn(sizes.rows, sizes.vocab, device=device) * 3
    return [logits, torch.randint(sizes.vocab, (sizes.rows,), device=device)]


def _norm_inputs(sizes: Sizes, device: torch.device) -> list[Tensor]:
    return [torch.randn(sizes.rows, sizes.width, device=device), torch.rand(sizes.width, device=device)]


def _add_norm_inputs(sizes: Sizes, device: torch.device) -> list[Tensor]:
    return [torch.randn(sizes.rows, sizes.width, device=device), *_norm_inputs(sizes, device)]


def _rope_inputs(sizes: Sizes, device: torch.device) -> list[Tensor]:
    x = torch.randn(sizes.rows, sizes.width // sizes.head, sizes.head, device=device)
    angles = torch.rand(sizes.rows, sizes.head // 2, device=device) * 6
    return [x, angles.cos(), angles.sin()]


def _gated_inputs(sizes: Sizes, device: torch.device) -> list[Tensor]:
    gate, up = (torch.randn(sizes.rows, sizes.inner, device=device) for _ in range(2))
    return [gate, up, torch.randn(sizes.width, sizes.inner, device=device) / math.sqrt(sizes.inner)]


def _plain_geglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return reference.gated(gate, up, "gelu_tanh") @ weight.T


def _liger_add_norm(liger: ModuleType) -> Function:
    def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = liger.liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)
        return total, normed

    return function


def _liger_logps(liger: ModuleType) -> Function:
    """It always works in place."""
    return lambda logits, targets: -liger.liger_cross_entropy(logits.view_as(logits), targets, reduction="none")


def _with_eps(function: Function) -> Function:
    return lambda *inputs, **options: function(*inputs, EPS, **options)


def _numbers(tensors: int) -> Callable[[Sizes], int]:
    return lambda sizes: tensors * sizes.rows * sizes.width


OPERATORS = {
    "linear_logps": Operator(
        _linear_logps_inputs, 2, (0, 2), reference.linear_logps, linear_logps, None,
        True, lambda sizes: 2 * sizes.rows * sizes.width * sizes.vocab,
    ),
    "logits_logps": Operator(
        _logits_inputs, 1, (0, 1), reference.logps_from_logits, logps_from_logits,
        _liger_logps,
        False, lambda sizes: 3 * sizes.rows * sizes.vocab,
    ),
    "rms_norm": Operator(
        _norm_inputs, 2, (0,), _with_eps(reference.rms_norm), _with_eps(rms_norm),
        lambda liger: lambda x, weight: liger.liger_rms_norm(x, weight, EPS, in_place=False),
        False, _numbers(5),
    ),
    "add_rms_norm": Operator(
        _add_norm_inputs, 3, (0, 1), _with_eps(reference.add_rms_norm), _with_eps(add_rms_norm), _liger_add_norm,
        False, _numbers(8),
    ),
    "rope": Operator(
        _rope_inputs, 1, (0, 1, 2), reference.apply_rope, apply_rope, None,
        False, _numbers(4),
    ),
    "swiglu_linear": Operator(
        _gated_inputs, 3, (0, 1), reference.swiglu_linear, swiglu_linear,
        lambda liger: lambda gate, up, weight: liger.liger_swiglu(gate, up) @ weight.T,
        True, lambda sizes: 2 * sizes.rows * sizes.inner * sizes.width,
    ),
    "geglu_linear": Operator(
        _gated_inputs, 3, (0, 1), _plain_geglu_linear, geglu_linear,
        lambda liger: lambda gate, up, weight: liger.liger_geglu(gate, up) @ weight.T,
        True, lambda sizes: 2 * sizes.rows * sizes.inner * sizes.width,
    ),
}  # fmt: skip


# --- what may not be there -------------------------------------------------------------------------------------------


def _no_compiler(device: torch.device) -> str:
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") is not None else "Triton is not installed"
    known = (os.environ.get("CXX"), "g++", "clang++")
    return "" if any(name and shutil.which(name) for name in known) else "no C++ compiler here"


def _no_package(name: str, device: torch.device) -> str:
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    return "" if device.type == "cuda" else "it needs a GPU"


def _liger() -> ModuleType:
    return importlib.import_module("liger_kernel.transformers.functional")


def _cut_cross_entropy() -> Function:
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy
