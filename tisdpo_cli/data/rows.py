"""Dataset rows, valid and invalid, what happens to invalid ones, and when a text is empty. Knows no files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from tisdpo_cli.errors import DataError, TisdpoError

T = TypeVar("T")


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Return consecutive items in lists of this size, the last one perhaps shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


@dataclass(frozen=True)
class Row:
    """One row of a file with all its columns, and its place for messages: `FILE:LINE` or `FILE:ROW`."""

    where: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """An invalid row and the reason."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


def checked_row(where: str, columns: dict[str, Any]) -> Row | BadRow:
    """Return a row, or a bad one if its text holds what no text may hold, in any column.

    Raises:
        RecursionError: a value is nested too deeply.
    """
    problem = _text_fault(columns)
    return Row(where, columns) if problem is None else BadRow(where, problem)


def _text_fault(value: Any) -> str | None:
    if isinstance(value, str):
        if "\0" in value:
            return "a NUL character (\\u0000) in the text"
        if not value.isascii() and any("\ud800" <= ch <= "\udfff" for ch in value):
            return "a lone surrogate (half of a character) in the text"
        return None
    if isinstance(value, dict):
        return next((fault for pair in value.items() for inner in pair if (fault := _text_fault(inner))), None)
    if isinstance(value, list):
        return next((fault for inner in value if (fault := _text_fault(inner))), None)
    return None


def handle_bad_rows(bad: list[BadRow], total: int, on_bad_row: str, shown: int = 20) -> list[str]:
    """Raise an error that lists the invalid rows, or return the lines that report them.

    Args:
        bad: the invalid rows.
        total: number of rows, invalid ones included.
        on_bad_row: `error` or `skip`.
        shown: how many rows to list.

    Raises:
        DataError: there are invalid rows and `on_bad_row` is `error`, or no valid row is left.
    """
    if not bad:
        return []
    if len(bad) >= total:
        raise _no_valid_row(bad, shown)
    lines = _listed([str(row) for row in bad], shown)
    if on_bad_row == "skip":
        return [f"skipped {len(bad)} of {total} rows (invalid):", *lines]
    raise _summary(bad, total, tuple(lines) if len(bad) > 1 else ())


def _listed(lines: list[str], shown: int) -> list[str]:
    return lines[:shown] + ([f"… and {len(lines) - shown} more"] if len(lines) > shown else [])


def _summary(bad: list[BadRow], total: int, details: tuple[str, ...]) -> TisdpoError:
    first = bad[0]
    if len(bad) == 1:
        return DataError(first.why, where=first.where, fix="fix the row, or skip bad rows with --on-bad-row skip")
    return DataError(
        f"{first.why} ({len(bad)} of {total} rows are invalid)",
        where=first.where,
        fix="fix the rows, or skip bad rows with --on-bad-row skip",
        details=details,
    )


def _no_valid_row(bad: Sequence[BadRow], shown: int) -> TisdpoError:
    """The error if every row is invalid: each kind of problem once, with its count. Skipping would leave nothing."""
    first, count = bad[0], len(bad)
    kinds: dict[str, list[BadRow]] = {}
    for row in bad:
        # Numbers and quoted values differ from row to row in one kind of problem.
        kinds.setdefault(re.sub(r"\d+(\.\d+)?", "#", row.why), []).append(row)
    details = [f"{rows[0]} ({len(rows)} rows)" if len(rows) > 1 else str(rows[0]) for rows in kinds.values()]
    counted = f" ({count} of {count} rows are invalid)" if count > 1 else ""
    return DataError(
        f"{first.why}{counted}",
        where=first.where,
        fix="fix the rows" if count > 1 else "fix the row",
        details=tuple(_listed(details, shown)) if len(details) > 1 else (),
    )


def emptiness(text: str) -> str | None:
    """Return in what way a text of a prompt or a response is empty, or None."""
    if not text.strip():
        return "is empty"
    return "is empty (only invisible characters)" if all(map(_is_invisible, text)) else None


# Letters without a shape, which are no format characters to Unicode.
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"


def _is_invisible(ch: str) -> bool:
    """Whether a character alone shows nothing: blank, control, format (such as U+200B), filler or mark."""
    return ch.isspace() or ch in _FILLERS or unicodedata.category(ch) in ("Cc", "Cf", "Mn", "Me", "Zl", "Zp", "Zs")
