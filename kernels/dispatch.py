"""Which implementation an operator runs, and which precision float32 products run at.

`resolve` turns "auto" into a name; the environment variable LOGRATIO_KERNELS takes the place of "auto".
`choose_matmul_precision` measures, because the answer differs between processors and cannot be told from their names.
Not here: the operators.
"""

import functools
import importlib
import importlib.util
import logging
import os
import time
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
VARIABLE = "LOGRATIO_KERNELS"

logger = logging.getLogger("kernels")
_said: set[str] = set()


def resolve(impl: str = "auto", device: torch.device | None = None, dtype: torch.dtype | None = None) -> str:
    """The implementation to run, "reference", "cpu" or "triton", for `impl` as a caller or the config names it.

    device: where the tensors lie; None is a CPU. dtype: theirs, where it is known. "auto" means what LOGRATIO_KERNELS
    says, else "triton" on a GPU and "cpu" (PyTorch operators in a good order: they run on any device) elsewhere, and
    where Triton is not installed.
    Says its choice once through logging. Raises ValueError for an unknown name, and for "triton" where it cannot run:
    on tensors in CPU memory without Triton's interpreter (TRITON_INTERPRET=1), in bfloat16 in the interpreter, which
    computes with its bits as if they were a whole number (Triton 3.7), or without Triton.
    """
    source = "asked for"
    if impl == "auto":
        impl, source = os.environ.get(VARIABLE, "auto"), f"from {VARIABLE}"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"kernels {impl!r} ({source}): must be one of {', '.join(IMPLEMENTATIONS)}")
    on_gpu = device is not None and device.type == "cuda"  # ROCm builds of PyTorch call their devices so too
    if impl == "auto":
        impl, source = ("triton", "on a GPU") if on_gpu and _triton_is_installed() else ("cpu", "the default")
    if impl == "triton":
        if not _triton_is_installed():
            raise ValueError(f"kernels 'triton' ({source}): the package triton is not installed; use 'cpu' or 'auto'")
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"kernels 'triton' ({source}): the tensors are in CPU memory, Triton needs a GPU; use 'cpu' or 'auto', "
                "or set TRITON_INTERPRET=1 to run the kernels slowly in its interpreter"
            )
        if not on_gpu and dtype == torch.bfloat16:
            raise ValueError(
                f"kernels 'triton' ({source}): Triton's interpreter computes bfloat16 wrongly; use float32, or 'cpu'"
            )
    if not torch.compiler.is_compiling() and impl not in _said:  # a graph cannot hold a message
        _said.add(impl)
        logger.info("kernels: %s (%s)", impl, source)
    return impl


def triton_module(operator: str) -> ModuleType:
    """The module with the operator's Triton kernels, `kernels/<operator>_triton.py`; the only way they are imported."""
    return importlib.import_module(f"kernels.{operator}_triton")


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class MatmulReading:
    """What one setting of `torch.set_float32_matmul_precision` does to a float32 product on this machine."""

    error: float
    """Largest difference from the float64 product, over the largest magnitude of that product."""
    milliseconds: float
    """Least CPU time of the product, of all threads torch has now."""


@dataclass(frozen=True)
class MatmulChoice:
    """The setting `choose_matmul_precision` picked, and why."""

    precision: str
    """"highest" or "medium"."""
    highest: MatmulReading
    medium: MatmulReading


def choose_matmul_precision(rows: int = 512, width: int = 576, columns: int = 1536, repeats: int = 9) -> MatmulChoice:
    """Choose "medium" if float32 products are faster with it and err at most twice as much as with "highest".

    Measured at (rows, width) x (width, columns) against float64, in about 0.2 s. Two runs on one machine are the same
    bit for bit only if both choose the same, so what counts is the least CPU time of `repeats`, which other work on the
    machine hardly changes: on a busy one the wall time changed its mind in every fifth run. "medium" lets PyTorch
    leave its default library: on some processors that is faster and as exact, on others it rounds to bfloat16. The
    setting that was found is restored.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, width, generator=generator)
    right = torch.randn(width, columns, generator=generator)
    truth = left.double() @ right.double()
    found = torch.get_float32_matmul_precision()
    times: dict[str, list[float]] = {"highest": [], "medium": []}
    errors: dict[str, float] = {}
    try:
        for _ in range(repeats):  # in turn, so that a busy moment of the machine falls on both
            for precision, readings in times.items():
                torch.set_float32_matmul_precision(precision)
                product, seconds = _timed_product(left, right)
                readings.append(seconds)
                errors[precision] = float((product - truth).abs().max() / truth.abs().max())
    finally:
        torch.set_float32_matmul_precision(found)
    # the first round pays for setting up the libraries
    highest, medium = (MatmulReading(errors[name], min(times[name][1:]) * 1e3) for name in times)
    return choose_precision(highest, medium)


def choose_precision(highest: MatmulReading, medium: MatmulReading) -> MatmulChoice:
    """The rule that `choose_matmul_precision` applies to its readings."""
    better = medium.milliseconds < highest.milliseconds and medium.error <= 2 * highest.error
    return MatmulChoice("medium" if better else "highest", highest, medium)


def _timed_product(left: Tensor, right: Tensor) -> tuple[Tensor, float]:
    start = time.process_time()
    product = left @ right
    return product, time.process_time() - start
