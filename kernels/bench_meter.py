"""How `kernels.bench` measures: the device's name and cache, seconds, peak memory, and how fast the device can be.

A GPU is timed by its own events: the host fills its queue ahead, so that what is read is the device's time. Not here:
what is measured.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 1024 * 1024
USUAL_CPU_CACHE = 32 * MIB
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>

Reading = Callable[[], float]
"""Seconds, to be asked for when the device is done (`synchronize`)."""


def device_name(device: torch.device) -> str:
    """Numbers are comparable where this is equal, at most."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"GPU {properties.name}, {properties.multi_processor_count} multiprocessors"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else 'of unknown model'}, {os.cpu_count()} cores"


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory: of a GPU L2, of a CPU what Linux says of L3."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return USUAL_CPU_CACHE
    return int(size.removesuffix("K")) * 1024


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(device: torch.device, clock: Callable[[], float]) -> Callable[[Callable[[], object]], Reading]:
    """Something that runs a function and returns its `Reading`. clock: of a CPU; a GPU has its own."""

    def on_cpu(function: Callable[[], object]) -> Reading:
        start = clock()
        function()
        seconds = clock() - start
        return lambda: seconds

    def on_gpu(function: Callable[[], object]) -> Reading:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    return on_gpu if device.type == "cuda" else on_cpu


def ceiling(device: torch.device, dtype: torch.dtype, is_gemm: bool) -> tuple[Callable[[], object], float]:
    """What the device can do at best, as (a function, how much it does): FLOP of a bare product, bytes of a copy."""
    if not is_gemm:
        source = torch.zeros(4 * cache_bytes(device), dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source), 2.0 * source.numel()
    # on a CPU about a decoder's own products, small enough for a machine with little memory
    rows, inner, columns = (8192, 4096, 8192) if device.type == "cuda" else (2048, 576, 1536)
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, columns, device=device).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    return lambda: torch.mm(left, right, out=out), 2.0 * rows * inner * columns


def peak_mib(function: Callable[[], object], device: torch.device) -> float | None:
    """The most memory, MiB, held during `function` beyond what was held before; None where the system does not say.

    On a CPU, of the whole process, by Linux' count of resident pages.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    _give_back_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is resident now
        before = _resident_peak_mib()
        function()
        return _resident_peak_mib() - before
    except OSError:
        return None


def keep_freed() -> None:
    """From now on glibc keeps freed buffers, as in a training run: mapped anew each time, they would take up to half of
    a small operator's time. After `peak_mib`, from which kept memory would hide what is taken of it again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)


def _give_back_freed() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024
