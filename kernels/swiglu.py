"""SwiGLU, silu(gate) * up; see `reference.py` for its definition."""

from torch import Tensor

from kernels import reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    return reference.swiglu(gate, up)
