"""Reads CSV files: recognizes the separator and line ends, and has a place for every error. Knows no column names."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tisdpo_cli.data.rows import BadRow, Row, checked_row
from tisdpo_cli.data.source import MAX_BYTES, MAX_TEXT, Source, invalid_utf8, without_byte_order_mark
from tisdpo_cli.errors import DataError

# The usual one first: another is used only where this one does not fit.
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SAMPLE = 2**16


@dataclass(frozen=True)
class _Dialect:
    """How the records of a file are written.

    Attributes:
        separator: between values.
        blanks: whether the separator comes with a blank behind it.
        line_end: of physical lines.
    """

    separator: str
    blanks: bool
    line_end: bytes


def read_csv(source: Source, notices: list[str]) -> Iterator[Row | BadRow]:
    """Read the rows of a CSV file whose first line names the columns; all values are strings.

    Values are separated by commas, or by semicolons, tabs or bars where commas do not fit, and quoted if they contain
    separators, quotes or newlines. A byte order mark and CRLF are ignored.

    Args:
        source: file to read.
        notices: receives what was recognized.

    Raises:
        DataError: the whole file is unreadable: not UTF-8, a duplicate column, an unclosed quote.
    """
    dialect = _recognize(source, notices)
    csv.field_size_limit(MAX_BYTES)
    lines = _lines(source, dialect.line_end)
    records = csv.reader(lines, delimiter=dialect.separator, skipinitialspace=dialect.blanks, strict=True)
    names: list[str] | None = None
    # A record may span several lines, so it starts after the last line of the previous record.
    start_line = 1
    try:
        for record in records:
            where, start_line = f"{source.shown}:{start_line}", records.line_num + 1
            if not record:
                continue
            if names is None:
                names = _header(record, where, source, notices)
            elif len(record) != len(names):
                yield BadRow(where, f"{len(record)} values for {len(names)} columns")
            elif any("\0" in value for value in record):
                yield BadRow(where, "a NUL byte")
            else:
                yield checked_row(where, dict(zip(names, record, strict=True)))
    except csv.Error as error:
        where = f"{source.shown}:{start_line}"
        raise DataError(f"malformed CSV: {_reason(error)}", where=where, fix="fix the file") from error


_REASONS = {
    "unexpected end of data": "a quote is not closed",
    "field larger": f"a value longer than the limit of {MAX_TEXT}, or a quote that is not closed",
    "new-line character": "a carriage return outside quotes",
    "expected after": "text behind a closing quote",
    "line contains NUL": "a NUL byte",
}


def _reason(error: csv.Error) -> str:
    """The plain reason behind an error of Python's csv module."""
    return next((reason for part, reason in _REASONS.items() if part in str(error)), "cannot be split into values")


def _header(record: list[str], where: str, source: Source, notices: list[str]) -> list[str]:
    names = [name.strip() for name in record]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise DataError(f"duplicate column {duplicate!r}", where=where)
    if names != record:
        notices.append(f"{source.path.name}: ignoring blanks around the column names; values keep theirs")
    return names


def _lines(source: Source, line_end: bytes) -> Iterator[str]:
    with source.open() as stream:
        for number, line in enumerate(_split(iter(lambda: stream.read(2**18), b""), line_end, source), 1):
            if number == 1:
                line = without_byte_order_mark(source, line)
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise invalid_utf8(f"{source.shown}:{number}", source, line) from error


def _split(chunks: Iterable[bytes], line_end: bytes, source: Source) -> Iterator[bytes]:
    """The lines of a file with their ends; not splitlines, which splits at other characters too."""
    rest, number = b"", 0
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(line_end)
        for line in lines:
            number += 1
            yield line + line_end
        if len(rest) > MAX_BYTES:
            raise DataError(f"line longer than the limit of {MAX_TEXT}", where=f"{source.shown}:{number + 1}")
    if rest:
        yield rest


def _recognize(source: Source, notices: list[str]) -> _Dialect:
    """Recognize how a file is written, with a notice for what is unusual."""
    with source.open() as stream:
        sample = stream.read(_SAMPLE)
    line_end = b"\r" if b"\r" in sample and b"\n" not in sample else b"\n"
    if line_end == b"\r":
        notices.append(f"{source.path.name}: reading carriage returns (old Mac line ends) as line ends")
    # The last line of a sample that is not the whole file may be cut.
    whole = sample if len(sample) < _SAMPLE else sample[: sample.rfind(line_end) + 1]
    text = whole.decode("utf-8", errors="replace").removeprefix("\ufeff")
    lines = [line + line_end.decode() for line in text.split(line_end.decode())]
    separator = _separator(lines)
    if separator != ",":
        notices.append(f"{source.path.name}: values are separated by {_SEPARATORS[separator]}, not commas")
    blanks = _has_blanks(_sample_records(lines, separator, skip_blanks=False) or [])
    blanks = blanks and _is_consistent(_sample_records(lines, separator, skip_blanks=True))
    if blanks:
        notices.append(f"{source.path.name}: ignoring the blank behind each separator")
    return _Dialect(separator, blanks, line_end)


def _separator(lines: list[str]) -> str:
    fitting = [
        separator
        for separator in _SEPARATORS
        if any(_is_consistent(_sample_records(lines, separator, skip)) for skip in (False, True))
    ]
    others = [separator for separator in fitting if separator != ","]
    return others[0] if "," not in fitting and len(others) == 1 else ","


def _sample_records(lines: list[str], separator: str, skip_blanks: bool) -> list[list[str]] | None:
    """The records at the start of a file under a separator, or those before the first malformed one."""
    records = []
    try:
        for record in csv.reader(lines, delimiter=separator, skipinitialspace=skip_blanks, strict=True):
            records += [record] if record else []
    except csv.Error:
        return records if len(records) > 1 else None
    return records


def _is_consistent(records: list[list[str]] | None) -> bool:
    """Whether a header has several columns, and nearly all records as many values."""
    if not records or len(records[0]) < 2:
        return False
    same = sum(len(record) == len(records[0]) for record in records[1:])
    return same >= 0.5 * (len(records) - 1)


def _has_blanks(records: list[list[str]]) -> bool:
    """Whether a blank follows every separator, in the header and in every record."""
    return len(records) > 1 and all(
        len(record) > 1 and all(value.startswith(" ") for value in record[1:]) for record in records
    )
