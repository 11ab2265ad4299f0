"""Rotary position embedding; see `reference.py` for its definition."""

from torch import Tensor

from kernels import reference


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.apply_rope`."""
    return reference.apply_rope(x, cos, sin)
