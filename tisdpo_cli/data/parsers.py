"""Strict parsers of dataset files: every error has its file, line and column. Knows no column names."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.errors import DataError

# A longer line is usually a mistake, such as a whole file on one line.
MAX_LINE_BYTES = 8 * 2**20


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error


# JSON ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Iterator[Row | BadRow]:
    """Read the rows of a JSON Lines file or of one JSON array, in order; a `BadRow` for anything but a JSON object.

    Ignores blank lines, a byte order mark, CRLF and a missing last newline.

    Raises:
        DataError: the whole file is unreadable (UTF-16, a malformed array, no permission).
    """
    with _open(path) as stream:
        number, started = 0, False
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = _strip_byte_order_mark(path, line)
            if not started and line.lstrip()[:1] == b"[":
                yield from _json_array(path, b"\n" * (number - 1) + line + stream.read())
                return
            started = started or bool(line.strip())
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"line longer than the limit of {MAX_LINE_BYTES // 2**20} MiB", where=where)
            if line.strip():
                yield _parse_line(where, line)


def _strip_byte_order_mark(path: Path, line: bytes) -> bytes:
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("UTF-16 text", where=f"{path}:1", fix="convert the file to UTF-8")
    return line.removeprefix(b"\xef\xbb\xbf")


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
    if _has_surrogate(columns):
        return BadRow(where, "a lone surrogate (half of a character) in the text")
    return Row(where, columns)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {duplicate!r}")
    return columns


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


_STRICT = json.JSONDecoder(
    object_pairs_hook=_reject_duplicates, parse_constant=_reject_constant, parse_float=_parse_float
)
# Finds the end of a value that the strict decoder rejects.
_LENIENT = json.JSONDecoder(parse_int=str)
_SPACE = re.compile(r"[ \t\r\n]*")


def _json_array(path: Path, content: bytes) -> Iterator[Row | BadRow]:
    """Read the rows of a JSON array, each with the line it starts on."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise DataError("invalid UTF-8", where=f"{path}:{line}:{column}") from error
    if "\0" in text:
        raise DataError("a NUL byte", where=f"{path}:{text.count(chr(10), 0, text.index(chr(0))) + 1}")
    try:
        for line, column, value in _json_elements(text):
            where = f"{path}:{line}"
            yield BadRow(f"{where}:{column}", value.why) if isinstance(value, _Invalid) else _row(where, value)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise DataError(f"malformed JSON: {error.msg}", where=where, fix="fix the file") from error
    except RecursionError as error:
        raise DataError("JSON nested too deeply", where=str(path), fix="fix the file") from error


@dataclass(frozen=True)
class _Invalid:
    """A JSON value that rows may not hold, and the reason."""

    why: str


def _json_elements(text: str) -> Iterator[tuple[int, int, Any]]:
    """Line, column and value of each element of an array.

    Raises:
        json.JSONDecodeError: the rest of the array is malformed.
    """
    position, line, counted = _skip_space(text, text.index("[") + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        column = position - text.rfind("\n", 0, position)
        try:
            value, end = _STRICT.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError):
            raise
        except ValueError as error:
            value, end = _Invalid(str(error)), _LENIENT.raw_decode(text, position)[1]
        yield line, column, value
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
            if text[position : position + 1] == "]":
                raise json.JSONDecodeError("Illegal trailing comma before end of array", text, position)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    if (rest := _skip_space(text, position + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= ch <= "\udfff" for ch in value)
    if isinstance(value, dict):
        return any(_has_surrogate(k) or _has_surrogate(v) for k, v in value.items())
    return isinstance(value, list) and any(_has_surrogate(item) for item in value)


def _type_name(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


# CSV -----------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> Iterator[Row | BadRow]:
    """Read the rows of a CSV file whose first line names the columns; all values are strings.

    Values are separated by commas and quoted if they contain commas, quotes or newlines. A byte order mark and CRLF are
    ignored.

    Raises:
        DataError: the whole file is unreadable: not UTF-8, a duplicate column, an unclosed quote.
    """
    with _open(path) as stream:
        content = _strip_byte_order_mark(path, stream.read())
    try:
        # By lines: a record may span several, so it starts after the last line of the previous record.
        lines = _split_lines(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError("invalid UTF-8", where=f"{path}:{line}") from error
    csv.field_size_limit(MAX_LINE_BYTES)
    records = csv.reader(lines, strict=True)
    names: list[str] | None = None
    start_line = 1
    try:
        for record in records:
            where, start_line = f"{path}:{start_line}", records.line_num + 1
            if not record:
                continue
            if names is None:
                names = _header(record, where)
            elif len(record) != len(names):
                yield BadRow(where, f"{len(record)} values for {len(names)} columns")
            elif any("\0" in value for value in record):
                yield BadRow(where, "a NUL byte")
            else:
                yield Row(where, dict(zip(names, record, strict=True)))
    except csv.Error as error:
        raise DataError(f"malformed CSV: {error}", where=f"{path}:{start_line}", fix="fix the file") from error


def _split_lines(text: str) -> list[str]:
    # Not splitlines, which also splits at characters that do not end a line of a file.
    return re.findall(r"[^\n]*\n|[^\n]+$", text)


def _header(record: list[str], where: str) -> list[str]:
    duplicate = next((name for name in record if record.count(name) > 1), None)
    if duplicate is not None:
        raise DataError(f"duplicate column {duplicate!r}", where=where)
    return record


# Parquet and Arrow ---------------------------------------------------------------------------------------------


def read_parquet(path: Path) -> Iterator[Row | BadRow]:
    """Read the rows of a Parquet file, numbered from 1; times and exact decimals become text.

    Raises:
        DataError: the file is damaged or not Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(path) as stream:
        try:
            batches = pq.ParquetFile(stream).iter_batches()
            yield from _numbered_rows(path, (columns for batch in batches for columns in batch.to_pylist()))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, "as Parquet", error) from error


def read_saved(path: Path) -> Iterator[Row | BadRow]:
    """Read the rows of a directory written by `save_to_disk` of `datasets`, as from a Parquet file.

    Raises:
        DataError: the directory is damaged.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise _unreadable(path, "as a saved dataset", error) from error
    yield from _numbered_rows(path, saved)


def _unreadable(path: Path, what: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return DataError(f"cannot be read {what}: {reason}", where=str(path), fix="create it again")


def _numbered_rows(path: Path, rows: Iterable[Any]) -> Iterator[Row | BadRow]:
    for number, columns in enumerate(rows, 1):
        where = f"{path}:{number}"
        try:
            yield Row(where, {name: _json_value(value) for name, value in columns.items()})
        except ValueError as error:
            yield BadRow(where, str(error))


def _json_value(value: Any) -> Any:
    """Convert a value to what JSON can hold.

    Raises:
        ValueError: the value is bytes or a number that is not finite.
    """
    if isinstance(value, float):
        return _parse_float(repr(value))
    if isinstance(value, dict):
        return {str(name): _json_value(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(inner) for inner in value]
    if isinstance(value, bytes):
        raise ValueError("a bytes value; text is needed")
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


# By the names of `FORMATS`.
PARSERS: Mapping[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    "JSONL": read_json,
    "JSON": read_json,
    "CSV": read_csv,
    "Parquet": read_parquet,
}
