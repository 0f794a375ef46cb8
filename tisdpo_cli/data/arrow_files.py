"""Arrow stream files that end with a record of how they came about and a hash; opened, they are mapped, not loaded.

Whatever reads Arrow streams (`datasets.Dataset.from_file`, `pyarrow.ipc.open_stream`) reads these: what follows the end
of the stream is ours. `pyarrow` is used alone: `datasets` would map the same file, after half a second of imports.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

IntArray = np.ndarray[Any, np.dtype[np.int64]]

_DIGEST, _LENGTH, _BLOCK = 32, 8, 2**22
# Rows read from a file before the memory of what was read is handed back.
_ROWS_KEPT = 1024


class ArrowWriter:
    """Writes one file."""

    def __init__(self, stream: BinaryIO, schema: pa.Schema) -> None:
        """Begin a file.

        Args:
            stream: receives it; an error of its `write` passes.
            schema: of the batches.
        """
        self._hashing = _Hashing(stream)
        self._stream = pa.ipc.new_stream(pa.PythonFile(self._hashing, "w"), schema)

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        self._stream.write_batch(batch)

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the record, of JSON-able values, and the hash."""
        self._stream.close()
        record = json.dumps(about).encode()
        self._hashing.write(record)
        self._hashing.write(len(record).to_bytes(_LENGTH, "little"))
        self._hashing.target.write(self._hashing.digest.digest())


class _Hashing(io.RawIOBase):
    """Hashes what is written to another stream."""

    def __init__(self, target: BinaryIO) -> None:
        self.target, self.digest = target, hashlib.sha256()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, content: Any) -> int:
        """Hash and write."""
        self.digest.update(content)
        self.target.write(content)
        return len(content)


class ArrowFile:
    """The rows of one file, read as they are asked for.

    Attributes:
        about: the record of how it came about.
    """

    def __init__(self, path: Path | None, content: bytes | mmap.mmap) -> None:
        """Use `open_arrow` or `in_memory`."""
        self.path, self._content = path, content
        length = int.from_bytes(content[-_DIGEST - _LENGTH : -_DIGEST], "little")
        self.about: dict[str, Any] = json.loads(content[-_DIGEST - _LENGTH - length : -_DIGEST - _LENGTH])
        self._batches: list[pa.RecordBatch] = list(pa.ipc.open_stream(pa.py_buffer(content)))
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + batch.num_rows)
        self._lists: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._read = 0

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[Callable[[Path], ArrowFile], tuple[Path]]:
        if self.path is None:
            raise TypeError("rows in memory cannot be sent to another process")
        return _mapped, (self.path,)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._content)

    def value(self, name: str, row: int) -> Any:
        """One value."""
        number, inside = self._place(row)
        return self._batches[number].column(name)[inside].as_py()

    def values(self, name: str, begin: int, end: int) -> list[Any]:
        """Values of consecutive rows."""
        found: list[Any] = []
        while begin < end:
            number, inside = self._place(begin)
            count = min(end - begin, self._starts[number + 1] - begin)
            found += self._batches[number].column(name).slice(inside, count).to_pylist()
            begin += count
            self._count(count)
        return found

    def ids(self, name: str, row: int) -> list[int]:
        """One value of a column of lists of integers: much faster than `value`."""
        number, inside = self._place(row)
        arrays = self._lists.get((number, name))
        if arrays is None:
            column = self._batches[number].column(name)
            arrays = self._lists[number, name] = (column.offsets.to_numpy(), column.values.to_numpy())
        offsets, values = arrays
        return values[offsets[inside] : offsets[inside + 1]].tolist()

    def numbers(self, name: str) -> IntArray:
        """A whole column of integers, or of lists: their lengths."""
        parts = []
        for batch in self._batches:
            column = batch.column(name)
            is_list = pa.types.is_list(column.type)
            parts.append(np.diff(column.offsets.to_numpy()) if is_list else column.to_numpy())
            self._count(batch.num_rows)
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

    def _place(self, row: int) -> tuple[int, int]:
        self._count(1)
        number = bisect_right(self._starts, row) - 1
        return number, row - self._starts[number]

    def _count(self, rows: int) -> None:
        """Hand memory back now and then: pages of a map stay resident until something else needs them."""
        self._read += rows
        if self._read >= _ROWS_KEPT:
            self._read = 0
            if isinstance(self._content, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                self._content.madvise(mmap.MADV_DONTNEED)


def open_arrow(path: Path) -> ArrowFile | None:
    """Open a file; None if it is damaged.

    Raises:
        OSError: it cannot be read.
    """
    digest, left = hashlib.sha256(), path.stat().st_size - _DIGEST
    with path.open("rb") as stream:
        while left > 0 and (block := stream.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
        if left or stream.read() != digest.digest():
            return None
    return _mapped(path)


def _mapped(path: Path) -> ArrowFile:
    with path.open("rb") as stream:
        return ArrowFile(path, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def in_memory(content: bytes) -> ArrowFile:
    """The rows of a file that could not be written anywhere."""
    return ArrowFile(None, content)


def list_array(lists: list[list[int]]) -> pa.ListArray:
    """A column of lists of token ids."""
    lengths = np.fromiter(map(len, lists), np.int32, len(lists))
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    values = np.fromiter((i for ids in lists for i in ids), np.int32, int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
