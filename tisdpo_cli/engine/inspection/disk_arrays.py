"""Arrays of one number per token, kept in temporary files and mapped into memory: a split may have more than fit there.

The files have no name and vanish with the process. Numbers computed from a mapped array are those of one in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tisdpo_cli.files import reporting_write_errors

# Numbers that are worked on at once.
BLOCK = 2**20


class Column:
    """Numbers appended one after the other.

    Raises:
        TrainingError: from all methods, there is no room for temporary files.
    """

    def __init__(self, kind: type[np.generic]) -> None:
        self._kind = np.dtype(kind)
        with _reporting_no_room():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the column is used
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, values: Any) -> None:
        """Add some numbers: a tensor [n] or a sequence."""
        array = np.asarray(values, self._kind)
        with _reporting_no_room():
            self._file.write(array.tobytes())
        self._count += len(array)

    def array(self) -> np.ndarray:
        """All numbers so far, [n]."""
        with _reporting_no_room():
            self._file.flush()
        # Copy-on-write, since torch takes no read-only array.
        return np.memmap(self._file, self._kind, "c", shape=self._count) if self._count else np.zeros(0, self._kind)

    def tensor(self) -> Tensor:
        """All numbers so far, [n]."""
        return torch.from_numpy(self.array())


def spans(ends: Column) -> Iterator[tuple[int, int]]:
    """Begin and end of consecutive ranges, from where each ends."""
    begin = 0
    for end in map(int, ends.array()):
        yield begin, end
        begin = end


def empty(count: int, kind: type[np.generic] | np.dtype[Any]) -> np.ndarray:
    """An array [count] to be filled, in a file where it is large.

    Raises:
        TrainingError: there is no room for temporary files.
    """
    if count <= BLOCK:
        return np.empty(count, kind)
    with _reporting_no_room():
        file = tempfile.TemporaryFile()  # noqa: SIM115 - mapped as long as the array is used
        if hasattr(os, "posix_fallocate"):
            # On a disk that is full later, writing to the map would kill the process.
            os.posix_fallocate(file.fileno(), 0, count * np.dtype(kind).itemsize)
        return np.memmap(file, kind, "w+", shape=count)


def _reporting_no_room() -> AbstractContextManager[None]:
    try:
        directory = tempfile.gettempdir()
    except OSError:  # none can be written
        directory = os.environ.get("TMPDIR", "/tmp")
    what, fix = "temporary files cannot be written", "free disk space, or set TMPDIR to a directory with more room"
    return reporting_write_errors(Path(directory), what, fix=fix)


def blocks(values: Tensor) -> Iterator[Tensor]:
    """Consecutive parts of a tensor [n]."""
    return iter(values.split(BLOCK)) if len(values) else iter(())


def order_statistics(parts: Iterable[Tensor], count: int, shares: tuple[float, ...]) -> list[float]:
    """The numbers below which some shares of all numbers are, exactly.

    Args:
        parts: the numbers, in parts, float32.
        count: of all of them, at least 1.
        shares: between 0 and 1.
    """
    places = [int(share * (count - 1)) for share in shares]
    array, end = empty(count, np.float32), 0
    for part in parts:
        array[end : end + len(part)] = part.numpy()
        end += len(part)
    array.partition(sorted(set(places)))
    return [float(array[place]) for place in places]


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks [n] from 1, in float64; equal values share their mean rank."""
    array = values.numpy()
    ordered, ranks = empty(len(array), array.dtype), empty(len(array), np.float64)
    ordered[:] = array
    ordered.sort()
    for begin in range(0, len(array), BLOCK):
        part = array[begin : begin + BLOCK]
        below, up_to = (np.searchsorted(ordered, part, side) for side in ("left", "right"))
        ranks[begin : begin + BLOCK] = (below + up_to + 1) / 2
    return torch.from_numpy(ranks)


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's r of two tensors [n] float64; None if one of them is constant."""
    first, second, product = (torch.from_numpy(empty(len(a), np.float64)) for _ in range(3))
    torch.sub(a, a.mean(), out=first)
    torch.sub(b, b.mean(), out=second)
    size = float(first.norm() * second.norm())
    return float(torch.mul(first, second, out=product).sum()) / size if size else None
