"""Reads Parquet files and saved Arrow datasets, which may be damaged or made to exhaust the memory.

Knows no column names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tisdpo_cli.data.json_rows import parse_float
from tisdpo_cli.data.rows import BadRow, Row, checked_row
from tisdpo_cli.data.source import MAX_BYTES, MAX_EXPANSION, MAX_TEXT, Source
from tisdpo_cli.errors import DataError, is_out_of_memory

_BATCH_ROWS = 256
# More rows than this, in less than a byte each, are repetition: no row with three texts takes so little.
_ROWS_WITHOUT_CHECK = 2**20
_COLUMN_WITHOUT_CHECK = 64 * 2**20


def read_parquet(source: Source, _notices: list[str]) -> Iterator[Row | BadRow]:
    """Read the rows of a Parquet file, numbered from 1; times and exact decimals become text.

    Raises:
        DataError: the file is damaged, not Parquet, or expands beyond reason.
    """
    import pyarrow.parquet as pq

    with source.open() as stream, _reporting_damage(source, "as Parquet"):
        file = pq.ParquetFile(stream)
        _limit_size(source, file.metadata)
        batches = file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False)
        yield from _numbered_rows(source, batches)


def _limit_size(source: Source, metadata: Any) -> None:
    """Refuse what the file announces to hold, before it is read.

    Raises:
        DataError: it expands beyond reason, or a value must be too long.
    """
    size = source.path.stat().st_size
    if metadata.num_rows > max(_ROWS_WITHOUT_CHECK, size):
        raise DataError(
            f"announces {metadata.num_rows} rows in {size} bytes",
            where=source.shown,
            fix="it is damaged or holds the same rows over and over; create it again",
        )
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for index in range(group.num_columns):
            column = group.column(index)
            unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
            if unpacked > MAX_BYTES * max(1, column.num_values):
                what = f"column {column.path_in_schema!r} has a value longer than the limit of {MAX_TEXT}"
                raise DataError(what, where=source.shown)
            if unpacked > max(_COLUMN_WITHOUT_CHECK, MAX_EXPANSION * packed):
                what = f"column {column.path_in_schema!r} expands to more than {MAX_EXPANSION} times its size"
                raise DataError(what, where=source.shown, fix="it is damaged or too repetitive; create it again")


def read_saved(source: Source, _notices: list[str]) -> Iterator[Row | BadRow]:
    """Read the rows of a directory written by `save_to_disk` of `datasets`, as from a Parquet file.

    Raises:
        DataError: the directory is damaged.
    """
    import datasets

    with _reporting_damage(source, "as a saved dataset"):
        tables = datasets.load_from_disk(str(source.path)).with_format("arrow").iter(batch_size=_BATCH_ROWS)
        yield from _numbered_rows(source, (batch for table in tables for batch in table.to_batches()))


@contextmanager
def _reporting_damage(source: Source, what: str) -> Iterator[None]:
    """Turn whatever the libraries raise on a damaged file into one error; running out of memory stays what it is."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # The message of a damaged file may itself be damaged.
        reason = "damaged" if isinstance(error, (UnicodeError, SystemError)) else (str(error).strip() or "damaged")
        raise DataError(
            f"cannot be read {what}: {reason.splitlines()[0][:120]}", where=source.shown, fix="create it again"
        ) from error


def _numbered_rows(source: Source, batches: Iterator[Any]) -> Iterator[Row | BadRow]:
    number = expanded = 0
    for batch in batches:
        # The offsets and texts of a damaged file are trusted by nothing else, and a wrong one crashes.
        batch.validate(full=True)
        plain = _without_dictionaries(batch)
        expanded += plain.nbytes
        source.limit_expansion(expanded)
        if plain.nbytes <= MAX_BYTES:
            rows = plain.to_pylist()
        else:
            slices = (plain.slice(index, 1) for index in range(plain.num_rows))
            rows = (None if row.nbytes > MAX_BYTES else row.to_pylist()[0] for row in slices)
        for row in rows:
            number += 1
            where = f"{source.shown}:{number}"
            yield _row(where, row) if row is not None else BadRow(where, f"row larger than the limit of {MAX_TEXT}")


def _without_dictionaries(batch: Any) -> Any:
    """A batch whose values are stored in place, so that its size is that of its rows."""
    import pyarrow as pa

    columns = [c.dictionary_decode() if isinstance(c, pa.DictionaryArray) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _row(where: str, columns: dict[str, Any]) -> Row | BadRow:
    try:
        return checked_row(where, {name: _json_value(value) for name, value in columns.items()})
    except (ValueError, RecursionError) as error:
        return BadRow(where, str(error) if isinstance(error, ValueError) else "nested too deeply")


def _json_value(value: Any) -> Any:
    """Convert a value to what JSON can hold.

    Raises:
        ValueError: the value is bytes or a number that is not finite.
    """
    if isinstance(value, float):
        return parse_float(repr(value))
    if isinstance(value, dict):
        return {str(name): _json_value(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(inner) for inner in value]
    if isinstance(value, bytes):
        raise ValueError("a bytes value; text is needed")
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)
