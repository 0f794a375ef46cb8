"""Reads JSON Lines and JSON arrays, strictly: every error has its file, line and column. Knows no column names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from tisdpo_cli.data.rows import BadRow, Row, checked_row
from tisdpo_cli.data.source import MAX_BYTES, MAX_TEXT, Source, invalid_utf8, without_byte_order_mark
from tisdpo_cli.errors import DataError


def read_json(source: Source, _notices: list[str]) -> Iterator[Row | BadRow]:
    """Read the rows of a JSON Lines file or of one JSON array, in order; a `BadRow` for anything but a JSON object.

    Ignores blank lines, a byte order mark, CRLF and a missing last newline.

    Raises:
        DataError: the whole file is unreadable (UTF-16, a malformed array, no permission).
    """
    with source.open() as stream:
        number, first = 0, True
        while line := stream.readline(MAX_BYTES + 1):
            number += 1
            if number == 1:
                line = without_byte_order_mark(source, line)
            if first and line.lstrip()[:1] == b"[":
                following = _next_line(stream) if _is_one_list(line) else (0, b"")
                if not following[1]:
                    yield from _ArrayReader(source, stream, number, line).rows()
                    return
                # A complete list with more lines behind it is the first row of JSON Lines, and a bad one.
                yield _line_row(source, number, line)
                number, line = number + following[0], following[1]
            if line.strip():
                first = False
                yield _line_row(source, number, line)


def _next_line(stream: IO[bytes]) -> tuple[int, bytes]:
    """The next line that is not blank, and how many lines further it is; empty at the end of the file."""
    count = 0
    while line := stream.readline(MAX_BYTES + 1):
        count += 1
        if line.strip():
            return count, line
    return 0, b""


def _is_one_list(line: bytes) -> bool:
    """Whether a line is a complete JSON list."""
    if len(line) > MAX_BYTES:
        return False
    try:
        return isinstance(_LENIENT.decode(line.decode("utf-8")), list)
    except (ValueError, RecursionError):
        return False


def _line_row(source: Source, number: int, line: bytes) -> Row | BadRow:
    where = f"{source.shown}:{number}"
    if len(line) > MAX_BYTES:
        raise DataError(f"line longer than the limit of {MAX_TEXT}", where=where)
    return _parse_line(where, line)


def _parse_line(where: str, line: bytes) -> Row | BadRow:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        if "\0" in text:
            return BadRow(where, "a NUL byte")
        return _row(where, _STRICT.decode(text))
    except UnicodeDecodeError as error:
        return BadRow(f"{where}:{error.start + 1}", "invalid UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(f"{where}:{error.colno}", f"malformed JSON: {error.msg}")
    except RecursionError:
        return BadRow(where, "JSON nested too deeply")
    except ValueError as error:
        return BadRow(where, str(error))


def _row(where: str, columns: Any) -> Row | BadRow:
    """Turn a JSON value into a row.

    Raises:
        RecursionError: the value is nested too deeply.
    """
    if not isinstance(columns, dict):
        return BadRow(where, f"a row must be a JSON object, not {_type_name(columns)}")
    return checked_row(where, columns)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {duplicate!r}")
    return columns


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_float(text: str) -> float:
    """Return a finite number.

    Raises:
        ValueError: it is not finite.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"a number of {len(text.lstrip('-'))} digits is out of range") from error


_STRICT = json.JSONDecoder(
    object_pairs_hook=_reject_duplicates,
    parse_constant=_reject_constant,
    parse_float=parse_float,
    parse_int=_parse_int,
)
# Finds the end of a value that the strict decoder rejects.
_LENIENT = json.JSONDecoder(parse_int=str)
_SPACE = re.compile(r"[ \t\r\n]*")
_CHUNK = 2**16


class _ArrayReader:
    """Reads a JSON array element by element, so that memory holds one element and not the file."""

    def __init__(self, source: Source, stream: IO[bytes], line: int, start: bytes) -> None:
        self._source, self._stream = source, stream
        self._pending, self._ended = b"", False
        # Line and column (in bytes) of what is decoded next, for errors of encoding.
        self._byte_line, self._byte_column = line, 1
        # Decoded text, how much of it is consumed, and the line and column of the rest.
        self._text, self._at, self._line, self._column = "", 0, line, 1
        self._add(start)

    def rows(self) -> Iterator[Row | BadRow]:
        """The rows, each with the line it starts on.

        Raises:
            DataError: the array is malformed.
        """
        try:
            yield from self._rows()
        except json.JSONDecodeError as error:
            newlines = self._text.count("\n", self._at, error.pos)
            column = (
                error.pos - self._text.rfind("\n", 0, error.pos) if newlines else self._column + error.pos - self._at
            )
            where = f"{self._source.shown}:{self._line + newlines}:{column}"
            raise DataError(f"malformed JSON: {error.msg}", where=where, fix="fix the file") from error
        except RecursionError as error:
            raise DataError("JSON nested too deeply", where=self._source.shown, fix="fix the file") from error

    def _rows(self) -> Iterator[Row | BadRow]:
        self._skip_to(self._text.index("[") + 1)
        while self._next() != "]":
            where, column = f"{self._source.shown}:{self._line}", self._column
            value, end = self._element(where)
            yield BadRow(f"{where}:{column}", str(value)) if isinstance(value, ValueError) else _row(where, value)
            self._skip_to(end)
            if self._next() == ",":
                self._skip_to(self._at + 1)
                if self._next() == "]":
                    raise json.JSONDecodeError("Illegal trailing comma before end of array", self._text, self._at)
            elif self._next() != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, self._at)
        self._skip_to(self._at + 1)
        if self._next():
            raise json.JSONDecodeError("Extra data", self._text, self._at)

    def _element(self, where: str) -> tuple[Any, int]:
        """The next element, or the reason why rows may not hold it, and its end in the text."""
        size = _CHUNK
        while True:
            try:
                value, end = self._decode()
                # A number may go on behind the end of the text.
                if end < len(self._text) or self._ended:
                    if end - self._at > MAX_BYTES:
                        raise DataError(f"element longer than the limit of {MAX_TEXT}", where=where)
                    return value, end
            except json.JSONDecodeError:
                if self._ended:
                    raise
            if len(self._text) - self._at > MAX_BYTES:
                self._raise_malformed_or_too_long(where)
            self._fill(size)
            size *= 2

    def _decode(self) -> tuple[Any, int]:
        try:
            return _STRICT.raw_decode(self._text, self._at)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            return error, _LENIENT.raw_decode(self._text, self._at)[1]

    def _raise_malformed_or_too_long(self, where: str) -> NoReturn:
        try:
            self._decode()
        except json.JSONDecodeError as error:
            if error.pos - self._at < MAX_BYTES // 2 and not error.msg.startswith("Unterminated string"):
                raise
        raise DataError(f"element longer than the limit of {MAX_TEXT}", where=where)

    def _next(self) -> str:
        """The next character that is not a blank, consumed up to it; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._skip_to(match.end())
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._fill(_CHUNK)

    def _skip_to(self, end: int) -> None:
        """Consume the text up to a position."""
        newlines = self._text.count("\n", self._at, end)
        self._line += newlines
        self._column = end - self._text.rfind("\n", 0, end) if newlines else self._column + end - self._at
        self._at = end

    def _fill(self, size: int) -> None:
        self._add(self._stream.read(size))

    def _add(self, content: bytes) -> None:
        self._ended = not content
        data, self._pending = self._pending + content, b""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            if self._ended or error.reason != "unexpected end of data":
                raise self._invalid(data, error.start) from error
            data, self._pending = data[: error.start], data[error.start :]
            text = data.decode("utf-8")
        if "\0" in text:
            line = self._byte_line + data.count(b"\n", 0, data.index(b"\0"))
            raise DataError("a NUL byte", where=f"{self._source.shown}:{line}")
        newlines = data.count(b"\n")
        self._byte_line += newlines
        self._byte_column = len(data) - data.rfind(b"\n") if newlines else self._byte_column + len(data)
        self._text, self._at = self._text[self._at :] + text, 0

    def _invalid(self, data: bytes, at: int) -> DataError:
        newlines = data.count(b"\n", 0, at)
        column = at - data.rfind(b"\n", 0, at) if newlines else self._byte_column + at
        line = self._byte_line + newlines
        return invalid_utf8(f"{self._source.shown}:{line}:{column}", self._source, data[at : at + 200])


def _type_name(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
