"""Inputs of `linear_logps`, a run of it, and the measure: no worse than twice plain PyTorch's error. Not a test itself.

Plain PyTorch is the reference in the same dtype; the truth is the reference in float64.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.linear_logps import linear_logps

ROUNDING = {torch.float64: 2**-48, torch.float32: 2**-24, torch.bfloat16: 2**-8}
WAYS = ["recompute", "stash", "frozen head", "frozen hidden"]


def make_inputs(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, *, spread: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets and an upstream gradient: logits have about `spread` as standard deviation.

    In every other row the target is a likely token.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    hidden = torch.randn(rows, width, generator=generator) * spread / width**0.5
    hidden[::2] += weight[targets[::2]] * 2 * spread / width
    grad = torch.randn(rows, generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets, grad


def make_bias(vocabulary: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad: Tensor,
    way: str,
    impl: str = "cpu",
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> list[Tensor | None]:
    """[logps, gradient by hidden, by weight, and by bias if there is one], None where a gradient is not asked for."""
    hidden = hidden.clone().requires_grad_(way != "frozen hidden")
    weight = weight.clone().requires_grad_(way != "frozen head")
    if bias is not None:
        bias = bias.clone().requires_grad_(way != "frozen head")
    logps = linear_logps(hidden, weight, targets, bias=bias, stash=way == "stash", impl=impl, **options)
    logps.backward(grad.to(logps.dtype))
    found = [logps.detach(), hidden.grad, weight.grad]
    return found if bias is None else [*found, bias.grad]


def assert_as_good_as_plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad: Tensor,
    way: str,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    options = {"scale": scale, "softcap": softcap}
    wide_bias = None if bias is None else bias.double()
    truth = run(hidden.double(), weight.double(), targets, grad, way, "reference", bias=wide_bias, **options)
    plain = run(hidden, weight, targets, grad, way, "reference", bias=bias, **options)
    ours = run(hidden, weight, targets, grad, way, bias=bias, **options)
    allowed = _slack(hidden, weight, bias, scale, truth[0], grad)
    names = ("logps", "by hidden", "by weight", "by bias")
    for name, exact, other, value, extra in zip(names, truth, plain, ours, allowed, strict=False):
        if exact is None:
            assert value is None, f"{way}: {name} was not asked for"
            continue
        error, baseline = float((value - exact).abs().max()), float((other - exact).abs().max())
        shapes = f"{tuple(hidden.shape)} {tuple(weight.shape)}"
        assert error <= 2 * baseline + extra, f"{way} {name}: {error=} {baseline=} {extra=} {shapes}"


def _slack(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, logps: Tensor, grad: Tensor
) -> list[float]:
    """What rounding may do to [logps, gradient by hidden, by weight, by bias] even where plain PyTorch is lucky.

    A logit is rounded in proportion to its size, and a probability by as much, except in bfloat16, where only logits
    near the row's center count. A gradient adds a few roundings of the largest numbers that are summed.
    """
    unit = ROUNDING[hidden.dtype]
    wide_bias = None if bias is None else bias.double()
    biggest_logit = float(reference.head_logits(hidden.double(), weight.double(), wide_bias, scale=scale).abs().max())
    if hidden.dtype == torch.bfloat16:
        of_logps, of_gradients = 1.5 * unit, 4 * unit
    else:
        of_logps, of_gradients = 4 * unit * (biggest_logit + float(logps.abs().max())), 4 * unit * (1 + biggest_logit)
    factors = [abs(scale) * weight.abs().max(), abs(scale) * hidden.abs().max(), torch.tensor(1.0)]
    return [of_logps, *(of_gradients * float(grad.abs().max() * factor) for factor in factors)]
