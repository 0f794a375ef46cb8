"""Reads the rows of files by their format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tisdpo_cli.data.parsers import PARSERS, read_saved
from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.data.source import Source
from tisdpo_cli.data.stdin import is_stdin
from tisdpo_cli.errors import DataError, naming_out_of_memory
from tisdpo_cli.files import matching_files, sha256
from tisdpo_cli.formats import format_of

# Files with a row on each line, and bytes read at once.
_LINES, _BLOCK = (".jsonl", ".ndjson"), 2**20


def read_rows(path: Path, notices: list[str] | None = None) -> Iterator[Row | BadRow]:
    """Read the rows of a split in order; invalid ones come as a `BadRow`. A file without a suffix holds JSON.

    Args:
        path: file, saved dataset or glob.
        notices: receives what was recognized about the files.

    Raises:
        DataError: the whole file is unreadable.
    """
    notices = notices if notices is not None else []
    for file in matching_files(path) or [path]:
        parse = read_saved if file.is_dir() else PARSERS[format_of(file.name) or "JSON"]
        with naming_out_of_memory("reading", shown_path(file)), _reporting_read_errors(file):
            yield from parse(Source(file, shown_path(file)), notices)


def count_rows(path: Path) -> int | None:
    """The number of rows, roughly; None where that takes as long as to read them.

    Args:
        path: file, saved dataset or glob.
    """
    total = 0
    for file in matching_files(path) or [path]:
        if not file.is_file() or file.suffix.lower() not in _LINES:
            return None
        with _reporting_read_errors(path), file.open("rb") as stream:
            total += sum(block.count(b"\n") for block in iter(lambda: stream.read(_BLOCK), b""))
    return total


def content_of(path: Path) -> dict[str, Any]:
    """What the rows of a split, their places and messages about them depend on, beside how they are read."""
    files = matching_files(path) or [path]
    with _reporting_read_errors(path):
        return {"content": sha256(*files, named=True), "files": [shown_path(file) for file in files], "name": path.name}


@contextmanager
def _reporting_read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot be read: {reason}", where=error.filename or shown_path(path)) from error


def shown_path(path: Path) -> str:
    """Return the name of a file in messages."""
    return "stdin" if is_stdin(path) else str(path)
