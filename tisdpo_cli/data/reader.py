"""Reads dataset files: strict JSON Lines, every fault with its file, line and column. Knows no columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tisdpo_cli.data.hub import fetch_splits
from tisdpo_cli.errors import DataError, TisdpoError
from tisdpo_cli.files import is_unfinished, near_matches

# A longer line is a mistake (a whole file on one line) far more often than a training row.
MAX_LINE_BYTES = 8 * 2**20
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file: all its columns, and `FILE:LINE` for messages."""

    where: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


def find_splits(dataset: str) -> dict[str, Path]:
    """The file of each split of a dataset: a JSONL file is `train`; a directory holds `train.jsonl`, `test.jsonl`;
    `owner/name` is fetched from the hub.

    Raises:
        UsageFault: there is nothing at the path, and the hub has no such dataset.
        DataError: what is there is no dataset.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        _known_format(path)
        return {"train": path}
    if path.is_dir():
        if is_unfinished(path):
            fix = "run the command that makes it again; it goes on"
            raise DataError("an output that is not finished", where=dataset, fix=fix)
        found = {split: path / f"{split}.jsonl" for split in SPLITS if (path / f"{split}.jsonl").is_file()}
        if "train" not in found:
            raise DataError("no train.jsonl in this directory", where=dataset, fix=_what_a_dataset_is(path))
        return found
    return fetch_splits(dataset, SPLITS, near_matches(path))


def _what_a_dataset_is(folder: Path) -> str:
    """What to do about a directory that is none; it may hold several."""
    inside = sorted(file.parent for file in folder.glob("*/train.jsonl"))
    if inside:
        return f"it holds several datasets; name one of them: {', '.join(map(str, inside[:4]))}"
    return "a dataset is a JSONL file, or a directory with train.jsonl and optionally test.jsonl"


def _known_format(path: Path) -> None:
    if path.suffix.lower() not in (".jsonl", ".json", ".ndjson", ""):
        raise DataError(
            f"files of type {path.suffix} are not read",
            where=str(path),
            fix="convert it to JSON Lines (one object per line)",
        )


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a JSONL file in order; a line that is no JSON object comes as a `BadRow`.

    Blank lines, a byte order mark, CRLF and a missing last newline change nothing.

    Raises:
        DataError: the file as a whole cannot be read (UTF-16, a JSON array, no permission).
    """
    try:
        stream = path.open("rb")
    except OSError as fault:
        raise DataError(f"cannot be read: {fault.strerror}", where=str(path)) from fault
    with stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = _start_of_file(path, line)
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"a line of more than {MAX_LINE_BYTES // 2**20} MiB, the limit", where=where)
            if line.strip():
                yield _parse(where, line)


def _start_of_file(path: Path, line: bytes) -> bytes:
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("UTF-16 text", where=f"{path}:1", fix="convert the file to UTF-8")
    line = line.removeprefix(b"\xef\xbb\xbf")
    if line.lstrip()[:1] == b"[":
        raise DataError("a JSON array", where=f"{path}:1", fix="write JSON Lines: one object per line")
    return line


def _parse(where: str, line: bytes) -> Row | BadRow:
    try:
        columns = _strict_json(line.decode("utf-8").rstrip("\r\n"))
        surrogate = _has_surrogate(columns)
    except UnicodeDecodeError as fault:
        return BadRow(f"{where}:{fault.start + 1}", "invalid UTF-8")
    except json.JSONDecodeError as fault:
        return BadRow(f"{where}:{fault.colno}", f"malformed JSON: {fault.msg}")
    except RecursionError:
        return BadRow(where, "JSON nested too deeply")
    except ValueError as fault:
        return BadRow(where, str(fault))
    if not isinstance(columns, dict):
        return BadRow(where, f"a row must be a JSON object, not {_kind(columns)}")
    if surrogate:
        return BadRow(where, "a lone surrogate (half of a character) in the text")
    return Row(where, columns)


def _strict_json(text: str) -> Any:
    if "\0" in text:
        raise ValueError("a NUL byte")
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)


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


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= ch <= "\udfff" for ch in value)
    if isinstance(value, dict):
        return any(_has_surrogate(k) or _has_surrogate(v) for k, v in value.items())
    return isinstance(value, list) and any(_has_surrogate(item) for item in value)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def stop_or_skip(bad: list[BadRow], total: int, on_bad_row: str, shown: int = 20) -> list[str]:
    """What to do with rows that cannot be used: stop with all of them told, or give the lines to report.

    Raises:
        DataError: there are bad rows and `on_bad_row` is `error`, or no other row is left.
    """
    if not bad:
        return []
    lines = [str(row) for row in bad[:shown]]
    if len(bad) > shown:
        lines.append(f"… and {len(bad) - shown} more")
    if on_bad_row == "skip" and len(bad) < total:
        return [f"skipped {len(bad)} of {total} rows that cannot be used:", *lines]
    raise _summary(bad, total, tuple(lines) if len(bad) > 1 else ())


def _summary(bad: list[BadRow], total: int, details: tuple[str, ...]) -> TisdpoError:
    first = bad[0]
    if len(bad) == 1:
        return DataError(first.why, where=first.where, fix="mend the row, or leave it out with --on-bad-row skip")
    what = f"{first.why} ({len(bad)} of {total} rows cannot be used)"
    return DataError(
        what, where=first.where, fix="mend them, or leave them out with --on-bad-row skip", details=details
    )
