"""Rows of datasets, usable or not, and what to do with those that are not. Knows no columns and no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tisdpo_cli.errors import DataError, TisdpoError


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file: all its columns, and `FILE:LINE` for messages, or `FILE:ROW`."""

    where: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


def handle_bad_rows(bad: list[BadRow], total: int, on_bad_row: str, shown: int = 20) -> list[str]:
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
