"""Without gradient, operators do not go by way of autograd; what they give is the same, to the last bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope, rotate_wide, whole_head
from kernels.swiglu_linear import geglu, swiglu, swiglu_linear

OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]] = {
    "rms_norm": lambda x, weight: rms_norm(x, weight, 1e-5),
    "add_rms_norm": lambda x, weight: add_rms_norm(x, x.flip(0), weight, 1e-5),
    "swiglu": lambda x, weight: swiglu(x, x.flip(0)),
    "geglu": lambda x, weight: geglu(x, x.flip(0)),
    "swiglu_linear": lambda x, weight: swiglu_linear(x, x.flip(0), torch.outer(weight[:7], weight)),
    "apply_rope": lambda x, weight: apply_rope(x.view(6, 4, 12), *angles()),
}


def angles() -> tuple[Tensor, Tensor]:
    turns = torch.outer(torch.arange(6.0), torch.linspace(0.1, 1, 6))
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_without_gradient_is_the_same(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 48, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(48, generator=generator).to(dtype)
    with_grad = OPERATORS[name](x, weight)
    with torch.no_grad():
        without = OPERATORS[name](x, weight)
    for own, other in zip(as_tuple(with_grad), as_tuple(without), strict=True):
        assert own.requires_grad and not other.requires_grad
        assert torch.equal(own, other)


def as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def test_tables_made_once_turn_as_apply_rope_does() -> None:
    """Of two kinds of heads at a time, the second turned by nothing."""
    cos, sin = angles()
    x = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(1))
    tables = whole_head(
        torch.cat((cos[:, None].expand(-1, 3, -1), torch.ones(6, 2, 6)), dim=1),
        torch.cat((sin[:, None].expand(-1, 3, -1), torch.zeros(6, 2, 6)), dim=1),
    )
    turned = rotate_wide(x, *tables)
    assert torch.equal(turned[:, :3], apply_rope(x[:, :3].contiguous(), cos, sin))
    assert torch.equal(turned[:, 3:], x[:, 3:])
