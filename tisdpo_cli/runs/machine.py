"""What this machine has: memory, free disk, and the rate of its matrix products."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch

# Limits of memory that a container sets, by control groups of version 2 and 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# Resident memory after all imports (measured on Linux).
_USUAL = 415_000_000
# Memory of a machine that does not say how much it has: enough.
_UNKNOWN = 2**63
# Edges of square matrices: large enough for the full rate, small enough for a few tenths of a second.
_CPU_EDGE, _GPU_EDGE = 768, 4096
_SECONDS, _MOST_PRODUCTS = 0.15, 200


def device_memory(device: torch.device) -> int:
    """Memory of a device in bytes: that of a GPU, or what this machine or container has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    for limit in _LIMITS:
        # Not there, or "max".
        with suppress(OSError, ValueError):
            sizes.append(int(Path(limit).read_text(encoding="ascii")))
    return min(sizes, default=_UNKNOWN)


def resident_memory() -> int:
    """What this process has in memory, in bytes; where the system does not say, what is usual."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return _USUAL
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_disk(path: Path) -> int:
    """Free bytes of the file system on which a path is, or would be made."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions per second of matrix products on a device, from a fraction of a second of them."""
    edge = _GPU_EDGE if device.type == "cuda" else _CPU_EDGE
    a, b = (torch.ones(edge, edge, device=device, dtype=dtype) for _ in range(2))
    best, began = 0.0, time.perf_counter()
    for number in range(_MOST_PRODUCTS):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The first one starts threads and finds kernels.
        if number:
            best = max(best, 2.0 * edge**3 / (time.perf_counter() - start))
        if number and time.perf_counter() - began > _SECONDS:
            break
    return best
