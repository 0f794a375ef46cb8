"""Dataset rows, valid and invalid, and what happens to the invalid ones. Knows no columns and no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tisdpo_cli.errors import DataError, TisdpoError


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
    lines = [str(row) for row in bad[:shown]]
    if len(bad) > shown:
        lines.append(f"… and {len(bad) - shown} more")
    if on_bad_row == "skip" and len(bad) < total:
        return [f"skipped {len(bad)} of {total} rows (invalid):", *lines]
    raise _summary(bad, total, tuple(lines) if len(bad) > 1 else ())


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
