"""What this machine has: memory, free disk, and the rate of its matrix products."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
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
# The same for weights that few rows are multiplied with: more than the caches of a core hold.
_CPU_WEIGHTS_EDGE = 2048
_SECONDS, _MOST_PRODUCTS = 0.15, 200
# Bytes that tell how fast files are read.
_READ = 32 * 2**20


def device_memory(device: torch.device) -> int:
    """Memory of a device in bytes: that of a GPU, or what this machine or container has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    sizes = []
    # Windows has no such call, and macOS not in every version such a name.
    with suppress(AttributeError, OSError, ValueError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
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


def read_rate(files: Sequence[Path]) -> float:
    """Bytes per second at which files are read and hashed, from the beginning of the first one."""
    began, size = time.perf_counter(), 0
    with suppress(OSError), files[0].open("rb") as stream:
        digest = hashlib.sha256()
        while size < _READ and (block := stream.read(2**20)):
            digest.update(block)
            size += len(block)
    return max(1, size) / max(1e-6, time.perf_counter() - began)


def product_rate(device: torch.device, dtype: torch.dtype, rows: int | None = None) -> float:
    """Multiplications and additions per second of matrix products on a device, from a fraction of a second of them.

    Args:
        device: where.
        dtype: of the matrices.
        rows: of the first matrix, few where responses are generated; as many as the second one has where None.
    """
    edge = _GPU_EDGE if device.type == "cuda" else _CPU_EDGE if rows is None else _CPU_WEIGHTS_EDGE
    rows = rows or edge
    a, b = (torch.ones(height, edge, device=device, dtype=dtype) for height in (rows, edge))
    best, began = 0.0, time.perf_counter()
    for number in range(_MOST_PRODUCTS):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The first one starts threads and finds kernels.
        if number:
            best = max(best, 2.0 * rows * edge**2 / (time.perf_counter() - start))
        if number and time.perf_counter() - began > _SECONDS:
            break
    return best
