"""Process-wide numeric settings: threads, determinism, float32 matmul mode, dtypes, and how freed memory is kept."""

import ctypes
import sys

import torch

COMPUTE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "pure_bf16": torch.bfloat16}

STEP0_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest allowed mean |policy - reference| log-prob a token, nats, while both are the same weights."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed buffers under 1 GiB instead of returning them to the kernel; True where it is glibc.

    A training step frees and takes the same large buffers over and over; with glibc's defaults each one is mapped and
    zeroed by the kernel anew, which costs page faults on every step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # musl and others
        return False
    # the mmap threshold first: glibc caps it at 32 MiB on 64-bit machines and answers 0 above that
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES) and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def set_up(*, threads: int | None, deterministic: bool, matmul: str) -> None:
    """Apply the run's settings. `matmul`: "highest" or "medium", as `torch.set_float32_matmul_precision` has them."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    # deterministic mode would also fill every fresh buffer; no operator here reads memory that it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision(matmul)
