"""Values of every token of both responses of many pairs, as float32 in one file that is mapped, not loaded."""

from __future__ import annotations

import io
import mmap
import tempfile
from collections.abc import Sequence
from typing import IO, overload

import numpy as np
import torch
from torch import Tensor

from tisdpo_cli.data.arrow_files import IntArray

# Values of a pair's chosen and of its rejected response, each [tokens] float32 on the CPU.
Both = tuple[Tensor, Tensor]
# Responses that are written together.
_BLOCK = 1024


class FloatWriter:
    """Takes values one after the other, into a temporary file that has no name; into memory if it cannot be written."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._written = 0
        try:
            # Written in blocks by `_flush`, so that an error belongs to a block that is still there.
            self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0, prefix="tisdpo-")  # noqa: SIM115 (stays open)
        except OSError:
            self._file = io.BytesIO()

    def append(self, values: Tensor) -> None:
        """Add values [n] of float32."""
        self._waiting.append(values.detach().cpu().numpy().astype(np.float32).tobytes())
        if len(self._waiting) >= _BLOCK:
            self._flush()

    def values(self) -> FloatValues:
        """All values, in their order."""
        self._flush()
        if isinstance(self._file, io.BytesIO) or not self._written:
            return FloatValues(self._content())
        return FloatValues(mmap.mmap(self._file.fileno(), self._written, access=mmap.ACCESS_READ))

    def _flush(self) -> None:
        block = memoryview(b"".join(self._waiting))
        self._waiting = []
        try:
            self._write(block)
        except OSError:
            self._file = io.BytesIO(self._content())
            self._write(block)
        self._written += len(block)

    def _write(self, block: memoryview) -> None:
        self._file.seek(self._written)
        while block:
            # The end of a disk may take a part of it.
            block = block[self._file.write(block) :]

    def _content(self) -> bytes:
        self._file.seek(0)
        return self._file.read(self._written)


class FloatValues:
    """Values of float32, read as they are asked for."""

    def __init__(self, content: bytes | mmap.mmap) -> None:
        self._content = content
        self._values = np.frombuffer(content, np.float32)
        self._read = 0

    def __len__(self) -> int:
        return len(self._values)

    def between(self, begin: int, end: int) -> Tensor:
        """Values [end − begin] on the CPU."""
        self._read += 1
        if self._read % 1024 == 0 and isinstance(self._content, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            # Pages of a map stay resident until something else needs them.
            self._content.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(self._values[begin:end].copy())


class FloatPairs(Sequence[Both]):
    """Values of the tokens of both responses of each pair."""

    def __init__(self, values: FloatValues, lengths: IntArray, swaps: bool = False) -> None:
        """Divide values among pairs.

        Args:
            values: of the first pair's chosen response, of its rejected one, of the second pair's chosen one, …
            lengths: tokens of both responses of each pair, [n, 2].
            swaps: whether to return the rejected response first.
        """
        self._values, self._lengths, self._swaps = values, lengths, swaps
        self._ends = np.cumsum(lengths.reshape(-1))

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> Both: ...
    @overload
    def __getitem__(self, index: slice) -> list[Both]: ...
    def __getitem__(self, index: int | slice) -> Both | list[Both]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        pair = range(len(self))[index]
        chosen, rejected = (int(self._ends[2 * pair + side]) for side in (0, 1))
        begin = chosen - int(self._lengths[pair, 0])
        both = self._values.between(begin, chosen), self._values.between(chosen, rejected)
        return both[::-1] if self._swaps else both

    def swapped(self) -> FloatPairs:
        """The values with chosen and rejected swapped."""
        return FloatPairs(self._values, self._lengths, not self._swaps)
