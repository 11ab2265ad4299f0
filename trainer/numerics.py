"""Process-wide numeric settings: threads, determinism, float32 matmul mode, dtypes, and how freed memory is kept."""

import ctypes
import os
import sys

import torch

COMPUTE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "pure_bf16": torch.bfloat16}

STEP0_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest allowed mean |policy - reference| log-prob a token, nats, while both are the same weights."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # <linux/mman.h>; the second since Linux 6.1
_HUGE_PAGE = 2 << 20
_KEPT_BYTES = 1 << 30
_GIVEN_BACK_BYTES = 1 << 20

KEPT_PROGRAMS = 256
"""More than one step needs, so that no layer builds again what the one before it had."""


def prepare_process() -> None:
    """Settings of the C libraries, to be made before the first product: how memory and programs are kept.

    glibc keeps freed buffers under 1 GiB instead of returning them to the kernel: a training step frees and takes the
    same large buffers over and over, and with the defaults each one is mapped and zeroed anew. oneDNN and the layer
    above it keep a program of about 1 MB for each shape of a product, 1024 of them by default; here `KEPT_PROGRAMS`.
    cuBLAS needs a fixed workspace to give the same bits in every run; PyTorch's deterministic mode insists on it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(KEPT_PROGRAMS))
    _set_malloc(_KEPT_BYTES)


def use_huge_pages(address: int, size: int) -> None:
    """Ask Linux to put these bytes on pages of 2 MiB now; where it does not, nothing changes.

    The processor reads ahead within a page only: a step of sampling, which reads all weights for few rows, took 41.5 ms
    of one CPU in place of 45.5 (8 rows, SmolLM2-135M in bfloat16).
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    start, end = address // _HUGE_PAGE * _HUGE_PAGE, -(-(address + size) // _HUGE_PAGE) * _HUGE_PAGE
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def give_back_buffers() -> None:
    """Return freed buffers of 1 MiB and more to the kernel at once, for a sharded run: gathered weights and gradients
    of many sizes come and go there, and kept buffers add up to more than sharding saves (two ranks of SmolLM2-135M in
    float32: 1.3 GB of holes beside 1.0 GB of tensors)."""
    _set_malloc(_GIVEN_BACK_BYTES)


def _set_malloc(num_bytes: int) -> None:
    """Buffers from so many bytes on are returned when freed; nothing happens where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # musl and others
        return
    libc.mallopt(_M_MMAP_THRESHOLD, num_bytes)
    libc.mallopt(_M_TRIM_THRESHOLD, num_bytes)


def set_up(*, threads: int | None, deterministic: bool, matmul: str) -> None:
    """Apply the run's settings. `matmul`: "highest" or "medium", as `torch.set_float32_matmul_precision` has them."""
    if threads is not None:
        torch.set_num_threads(threads)
    # not use_deterministic_algorithms: it imports torch's compiler first, about a second of every start
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # deterministic mode would also fill every fresh buffer; no operator here reads memory that it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision(matmul)
