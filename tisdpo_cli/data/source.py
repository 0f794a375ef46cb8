"""Opens dataset files: plain ones and gzip, both with bounded reads. Knows no format and no rows."""

from __future__ import annotations

import gzip
import io
import shlex
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tisdpo_cli.errors import DataError

# A longer line, JSON element, record or cell is usually a mistake, such as a whole file on one line.
MAX_BYTES = 8 * 2**20
MAX_TEXT = f"{MAX_BYTES // 2**20} MiB"
# A file that expands this much holds next to nothing but repetition: damaged, or made to exhaust the memory.
MAX_EXPANSION = 200
_ALWAYS_ALLOWED = 64 * 2**20
GZIP = ".gz"


@dataclass(frozen=True)
class Source:
    """A file to read, and its name in messages."""

    path: Path
    shown: str

    def open(self) -> IO[bytes]:
        """Open the file, decompressed.

        Raises:
            DataError: it cannot be read.
        """
        try:
            stream = self.path.open("rb")
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=self.shown) from error
        if self.path.suffix.lower() != GZIP:
            return stream
        return io.BufferedReader(_Gunzipped(stream, self), 2**16)

    def limit_expansion(self, size: int) -> None:
        """Refuse content of a size that the size of the file cannot explain.

        Raises:
            DataError: it is too large.
        """
        if size <= _ALWAYS_ALLOWED:
            return
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        if size > MAX_EXPANSION * sum(file.stat().st_size for file in files):
            raise DataError(
                f"expands to more than {MAX_EXPANSION} times the size of the file",
                where=self.shown,
                fix="it is damaged or holds the same rows over and over; create it again",
            )


class _Gunzipped(io.RawIOBase):
    """The content of a gzip file, with its size bounded and its faults as ours."""

    def __init__(self, stream: IO[bytes], source: Source) -> None:
        self._stream, self._source, self._size = stream, source, 0
        self._inner = gzip.GzipFile(fileobj=stream)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read and count."""
        try:
            content = self._inner.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            reason = "truncated" if isinstance(error, EOFError) else "damaged or not gzip"
            raise DataError(
                f"cannot be decompressed: {reason}", where=self._source.shown, fix="create it again"
            ) from error
        self._size += len(content)
        self._source.limit_expansion(self._size)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close the file too."""
        if not self.closed:
            self._inner.close()
            self._stream.close()
        super().close()


def without_byte_order_mark(source: Source, start: bytes) -> bytes:
    """Return the start of a file without its UTF-8 byte order mark.

    Raises:
        DataError: the file is UTF-16.
    """
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("UTF-16 text", where=f"{source.shown}:1", fix=f"convert it to UTF-8: {iconv('UTF-16', source)}")
    return start.removeprefix(b"\xef\xbb\xbf")


def iconv(encoding: str, source: Source) -> str:
    """Return the command that converts a file to UTF-8."""
    if source.path.suffix.lower() == GZIP:
        unzipped = f"gunzip -c {quoted(source.path)} |"
        return f"{unzipped} iconv -f {encoding} -t UTF-8 > {quoted(converted(source.path))}"
    return f"iconv -f {encoding} -t UTF-8 {quoted(source.path)} > {quoted(converted(source.path))}"


def invalid_utf8(where: str, source: Source, line: bytes) -> DataError:
    """Return the error for text that is not UTF-8, with its likely encoding and the command that converts it."""
    name, encoding = ("Windows-1252", "CP1252") if any(0x80 <= b < 0xA0 for b in line) else ("Latin-1", "ISO-8859-1")
    return DataError(f"invalid UTF-8 (probably {name})", where=where, fix=f"convert it: {iconv(encoding, source)}")


def converted(path: Path, suffix: str | None = None) -> Path:
    """Return a name for the converted copy of a file, in the current directory."""
    name = Path(path.name.removesuffix(GZIP))
    return Path(f"{name.stem}-utf8{name.suffix}" if suffix is None else f"{name.stem}{suffix}")


def quoted(path: Path) -> str:
    """Return a path as the shell reads it."""
    return shlex.quote(str(path))
