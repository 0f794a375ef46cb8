"""Formats of dataset files, strictly read: every fault with its file, line and column. Knows no columns."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.errors import DataError

# A longer line is a mistake (a whole file on one line) far more often than a training row.
MAX_LINE_BYTES = 8 * 2**20


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as fault:
        raise DataError(f"cannot be read: {fault.strerror}", where=str(path)) from fault


# JSON ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a file of JSON Lines or of one JSON array, in order; what is no JSON object comes as a `BadRow`.

    Blank lines, a byte order mark, CRLF and a missing last newline change nothing.

    Raises:
        DataError: the file as a whole cannot be read (UTF-16, an array that is malformed, no permission).
    """
    with _opened(path) as stream:
        number, begun = 0, False
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = _start_of_file(path, line)
            if not begun and line.lstrip()[:1] == b"[":
                yield from _array(path, b"\n" * (number - 1) + line + stream.read())
                return
            begun = begun or bool(line.strip())
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"a line of more than {MAX_LINE_BYTES // 2**20} MiB, the limit", where=where)
            if line.strip():
                yield _parse(where, line)


def _start_of_file(path: Path, line: bytes) -> bytes:
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("UTF-16 text", where=f"{path}:1", fix="convert the file to UTF-8")
    return line.removeprefix(b"\xef\xbb\xbf")


def _parse(where: str, line: bytes) -> Row | BadRow:
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        if "\0" in text:
            return BadRow(where, "a NUL byte")
        return _row(where, _STRICT.decode(text))
    except UnicodeDecodeError as fault:
        return BadRow(f"{where}:{fault.start + 1}", "invalid UTF-8")
    except json.JSONDecodeError as fault:
        return BadRow(f"{where}:{fault.colno}", f"malformed JSON: {fault.msg}")
    except RecursionError:
        return BadRow(where, "JSON nested too deeply")
    except ValueError as fault:
        return BadRow(where, str(fault))


def _row(where: str, columns: Any) -> Row | BadRow:
    """A value as a row.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if not isinstance(columns, dict):
        return BadRow(where, f"a row must be a JSON object, not {_kind(columns)}")
    if _has_surrogate(columns):
        return BadRow(where, "a lone surrogate (half of a character) in the text")
    return Row(where, columns)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return columns


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
# Finds the end of what the strict one refuses.
_LENIENT = json.JSONDecoder(parse_int=str)
_SPACE = re.compile(r"[ \t\r\n]*")


def _array(path: Path, content: bytes) -> Iterator[Row | BadRow]:
    """Rows of a JSON array; each has the line on which it begins."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        column = fault.start - content.rfind(b"\n", 0, fault.start)
        raise DataError("invalid UTF-8", where=f"{path}:{line}:{column}") from fault
    if "\0" in text:
        raise DataError("a NUL byte", where=f"{path}:{text.count(chr(10), 0, text.index(chr(0))) + 1}")
    try:
        for line, column, value in _elements(text):
            where = f"{path}:{line}"
            yield BadRow(f"{where}:{column}", value.why) if isinstance(value, _Unusable) else _row(where, value)
    except json.JSONDecodeError as fault:
        where = f"{path}:{fault.lineno}:{fault.colno}"
        raise DataError(f"malformed JSON: {fault.msg}", where=where, fix="mend the file") from fault
    except RecursionError as fault:
        raise DataError("JSON nested too deeply", where=str(path), fix="mend the file") from fault


@dataclass(frozen=True)
class _Unusable:
    """JSON, but not of a kind that rows may hold."""

    why: str


def _elements(text: str) -> Iterator[tuple[int, int, Any]]:
    """Line, column and value of the elements of an array.

    Raises:
        json.JSONDecodeError: it is malformed from some place on.
    """
    at, line, counted = _skip(text, text.index("[") + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        column = at - text.rfind("\n", 0, at)
        try:
            value, end = _STRICT.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            raise
        except ValueError as fault:
            value, end = _Unusable(str(fault)), _LENIENT.raw_decode(text, at)[1]
        yield line, column, value
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("Illegal trailing comma before end of array", text, at)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    if (rest := _skip(text, at + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= ch <= "\udfff" for ch in value)
    if isinstance(value, dict):
        return any(_has_surrogate(k) or _has_surrogate(v) for k, v in value.items())
    return isinstance(value, list) and any(_has_surrogate(item) for item in value)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


# CSV -----------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a CSV file whose first line names the columns; all values are strings.

    Separated by commas, quoted where they hold commas, quotes or newlines; a byte order mark and CRLF change nothing.

    Raises:
        DataError: the file as a whole cannot be read: no UTF-8, a name of a column twice, a quote that is not closed.
    """
    with _opened(path) as stream:
        content = _start_of_file(path, stream.read())
    try:
        # By lines: a record may go over several, and begins after those of the one before.
        lines = _lines(content.decode("utf-8"))
    except UnicodeDecodeError as fault:
        line = content.count(b"\n", 0, fault.start) + 1
        raise DataError("invalid UTF-8", where=f"{path}:{line}") from fault
    csv.field_size_limit(MAX_LINE_BYTES)
    records = csv.reader(lines, strict=True)
    names: list[str] | None = None
    begins = 1
    try:
        for record in records:
            where, begins = f"{path}:{begins}", records.line_num + 1
            if not record:
                continue
            if names is None:
                names = _names(record, where)
            elif len(record) != len(names):
                yield BadRow(where, f"{len(record)} values for {len(names)} columns")
            elif any("\0" in value for value in record):
                yield BadRow(where, "a NUL byte")
            else:
                yield Row(where, dict(zip(names, record, strict=True)))
    except csv.Error as fault:
        raise DataError(f"malformed CSV: {fault}", where=f"{path}:{begins}", fix="mend the file") from fault


def _lines(text: str) -> list[str]:
    # Not splitlines: it also cuts at characters that are no ends of lines in a file.
    return re.findall(r"[^\n]*\n|[^\n]+$", text)


def _names(record: list[str], where: str) -> list[str]:
    twice = next((name for name in record if record.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"column {twice!r} stands twice", where=where)
    return record


# Parquet and Arrow ---------------------------------------------------------------------------------------------


def read_parquet(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file, numbered from 1; times and exact decimals become text.

    Raises:
        DataError: it is none, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _opened(path) as stream:
        try:
            batches = pq.ParquetFile(stream).iter_batches()
            yield from _numbered(path, (columns for batch in batches for columns in batch.to_pylist()))
        except (pa.ArrowException, OSError) as fault:
            raise _unreadable(path, "as Parquet", fault) from fault


def read_saved(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a directory that `save_to_disk` of `datasets` wrote, as those of a Parquet file.

    Raises:
        DataError: it is damaged.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as fault:
        raise _unreadable(path, "as a saved dataset", fault) from fault
    yield from _numbered(path, saved)


def _unreadable(path: Path, what: str, fault: Exception) -> DataError:
    told = (str(fault).strip().splitlines() or [type(fault).__name__])[0][:120]
    return DataError(f"cannot be read {what}: {told}", where=str(path), fix="make it again")


def _numbered(path: Path, rows: Iterable[Any]) -> Iterator[Row | BadRow]:
    for number, columns in enumerate(rows, 1):
        where = f"{path}:{number}"
        try:
            yield Row(where, {name: _plain(value) for name, value in columns.items()})
        except ValueError as fault:
            yield BadRow(where, str(fault))


def _plain(value: Any) -> Any:
    """A value as JSON holds it.

    Raises:
        ValueError: bytes, or a number that is not finite.
    """
    if isinstance(value, float):
        return _finite(repr(value))
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        raise ValueError("bytes, which are no text")
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)
