"""Writes rows as Parquet, and says beforehand which column of a dataset no Parquet file can hold.

JSON lets every row have other keys and types; a Parquet column has one type, in which missing keys are null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tisdpo_cli.data.rows import Row, batches
from tisdpo_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

# Rows that are converted together, and the size of a row group, which readers decompress as one.
_BATCH_ROWS = 64
_GROUP_BYTES = 32 * 2**20
# The columns with objects that a chat template sees as they are: null is not the same as no key to it.
_SHOWN_WHOLE = ("tools",)


def parquet_columns(rows: Callable[[], Iterable[Row]], fix: str) -> dict[str, pa.DataType]:
    """Return the Arrow type of every column of some rows.

    Args:
        rows: gives the rows, anew each time.
        fix: what to do about a column that has no type.

    Raises:
        DataError: a column has no one type, or reading it back would give other values.
    """
    types: dict[str, pa.DataType] = {}
    for batch in batches(rows(), _BATCH_ROWS):
        for name in dict.fromkeys(name for row in batch for name in row.columns):
            types[name] = _merged(name, types.get(name), batch, fix)
    doubtful = [name for name, kind in types.items() if _is_nested(kind) or _is_float(kind)]
    for batch in batches(rows(), _BATCH_ROWS) if doubtful else ():
        for name in doubtful:
            _check(name, types[name], batch, fix)
    return types


def write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], types: Mapping[str, pa.DataType]) -> None:
    """Write rows as Parquet, holding a row group in memory.

    Args:
        path: file.
        rows: columns of each row; null where one is missing.
        types: of all columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(list(types.items()))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        group: list[pa.RecordBatch] = []
        for batch in batches(rows, _BATCH_ROWS):
            arrays = [pa.array([row.get(name) for row in batch], kind) for name, kind in types.items()]
            group.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
            if sum(part.nbytes for part in group) >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(group))
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group))


def _merged(name: str, known: pa.DataType | None, batch: Sequence[Row], fix: str) -> pa.DataType:
    """The type of a column in the rows so far and in a batch."""
    import pyarrow as pa

    def merge(kind: pa.DataType | None, rows: Sequence[Row]) -> pa.DataType:
        schemas = [pa.schema([(name, pa.array([row.columns.get(name) for row in rows]).type)])]
        schemas += [] if kind is None else [pa.schema([(name, kind)])]
        # The order of the fields of the type that is known stays.
        return pa.unify_schemas(schemas[::-1], promote_options="permissive").field(0).type

    failures = (pa.ArrowException, OverflowError)
    try:
        return merge(known, batch)
    except failures:
        for row in batch:
            try:
                known = merge(known, [row])
            except failures:
                value = type(row.columns.get(name)).__name__
                why = f"{value} does not fit the rows before ({known})" if known is not None else f"{value} of several"
                what = f"column {name!r} cannot be one Parquet type: {why}"
                raise DataError(_shortened(what), where=row.where, fix=fix) from None
        # Each row fits, but not all together: an integer that is too large for a float.
        raise DataError(
            f"column {name!r} has numbers that Parquet would round", where=batch[0].where, fix=fix
        ) from None


def _shortened(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:159]}…"


def _is_nested(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind) or (pa.types.is_list(kind) and _is_nested(kind.value_type)))


def _is_float(kind: pa.DataType) -> bool:
    """Whether it holds floats, among which integers are rounded."""
    import pyarrow as pa

    return bool(pa.types.is_floating(kind) or (pa.types.is_list(kind) and _is_float(kind.value_type)))


def _check(name: str, kind: pa.DataType, batch: Sequence[Row], fix: str) -> None:
    """Check that objects are read back as they are, but for keys of messages and the like, which may become null, and
    that no number is rounded.

    Raises:
        DataError: they are not.
    """
    import pyarrow as pa

    values = [row.columns.get(name) for row in batch]
    if _has_empty(kind):
        what = f"column {name!r} cannot be a Parquet column: it has an object without keys in every row"
        raise DataError(what, where=batch[0].where, fix=fix)
    try:
        read_back = pa.array(values, kind).to_pylist()
    except pa.ArrowException:
        what = f"column {name!r} has numbers that Parquet would round"
        raise DataError(what, where=batch[0].where, fix=fix) from None
    if _is_float(kind):
        return
    for row, value, back in zip(batch, values, read_back, strict=True):
        if not _same(value, back, name not in _SHOWN_WHOLE):
            what = f"column {name!r} would change as Parquet: its objects have other keys or types in other rows"
            raise DataError(what, where=row.where, fix=fix)


def _has_empty(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind):
        return _has_empty(kind.value_type)
    if not pa.types.is_struct(kind):
        return False
    return kind.num_fields == 0 or any(_has_empty(kind.field(i).type) for i in range(kind.num_fields))


def _same(value: Any, back: Any, filled: bool) -> bool:
    """Whether a value is read back as it is; if `filled`, outer objects may have more keys, with null, in any order."""
    if isinstance(value, list):
        return isinstance(back, list) and all(_same(a, b, filled) for a, b in zip(value, back, strict=True))
    if isinstance(value, dict) and filled:
        return all(_same(value.get(key), inner, False) for key, inner in back.items())
    if isinstance(value, dict):
        return list(value) == list(back) and all(_same(inner, back[key], False) for key, inner in value.items())
    return type(value) is type(back) and value == back
