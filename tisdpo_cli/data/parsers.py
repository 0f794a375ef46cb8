"""The parser of each format by its name in `FORMATS`, and of saved datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from tisdpo_cli.data.csv_rows import read_csv
from tisdpo_cli.data.json_rows import read_json
from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.data.source import Source
from tisdpo_cli.data.table_rows import read_parquet, read_saved

# Takes a file and a list for notices about it.
Parser = Callable[[Source, list[str]], Iterator[Row | BadRow]]

__all__ = ["PARSERS", "Parser", "read_saved"]

PARSERS: Mapping[str, Parser] = {
    "JSONL": read_json,
    "JSON": read_json,
    "CSV": read_csv,
    "Parquet": read_parquet,
}
