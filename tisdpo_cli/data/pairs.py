"""Turns rows into preference pairs: finds the columns, checks types and emptiness. Knows no tokens."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tisdpo_cli.data.hints import missing_columns, other_shape, unused_context
from tisdpo_cli.data.reader import read_rows, shown_path
from tisdpo_cli.data.rows import BadRow, Row, handle_bad_rows
from tisdpo_cli.errors import DataError


@dataclass(frozen=True)
class Columns:
    """Column names of a preference dataset."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"

    def named(self) -> dict[str, str]:
        """Return role to column name."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class Pair:
    """One preference pair.

    Attributes:
        index: position among the valid rows, which seeds everything random by row.
        prompt: text of the prompt.
        chosen: text of the chosen response.
        rejected: text of the rejected response.
        row: the row with all its columns.
    """

    index: int
    prompt: str
    chosen: str
    rejected: str
    row: Row


@dataclass
class Pairs:
    """The pairs of a split, and messages for the user."""

    pairs: list[Pair]
    notices: list[str] = field(default_factory=list)


def read_pairs(path: Path, columns: Columns, on_bad_row: str) -> Pairs:
    """Read the preference pairs of a split.

    Args:
        path: file of the split.
        columns: column names.
        on_bad_row: `error` or `skip`.

    Raises:
        DataError: a row is invalid and `on_bad_row` is `error`; a column is missing in all rows; there are no rows.
    """
    rows, bad, total = [], [], 0
    notices: list[str] = []
    for row in read_rows(path, notices):
        total += 1
        problem = row if isinstance(row, BadRow) else _find_problem(row, columns)
        if problem is not None:
            bad.append(problem)
        if isinstance(row, Row):
            rows.append((row, problem is None))
    if not total:
        raise DataError("the file has no rows", where=shown_path(path))
    objects = [row for row, _ in rows]
    error = missing_columns(path, shown_path(path), objects, columns.named()) if objects else None
    if error is None and len(bad) == total:
        error = other_shape(path, shown_path(path))
    if error is not None:
        raise error
    notices += handle_bad_rows(bad, total, on_bad_row)
    valid = [row for row, is_valid in rows if is_valid]
    pairs = [
        Pair(i, row.columns[columns.prompt], row.columns[columns.chosen], row.columns[columns.rejected], row)
        for i, row in enumerate(valid)
    ]
    unused = unused_context(path.name, valid, list(columns.named().values()))
    return Pairs(pairs, [*notices, *unused, *_contradictions(path, pairs)])


def _find_problem(row: Row, columns: Columns) -> BadRow | None:
    for name in columns.named().values():
        if name not in row.columns:
            return BadRow(row.where, f"column {name!r} is missing")
        problem = text_problem(row.columns[name])
        if problem:
            return BadRow(row.where, f"{name!r} {problem}")
    return None


def text_problem(value: Any) -> str | None:
    """Return why a value cannot be the text of a prompt or response, or None."""
    if isinstance(value, list):
        return (
            "is a list; a string is needed (for a conversation: the text rendered by the model's chat template, with "
            "--special-tokens-in-data parse)"
        )
    if not isinstance(value, str):
        return f"is {'null' if value is None else type(value).__name__}; a string is needed"
    if not value.strip():
        return "is empty"
    return "is empty (only invisible characters)" if all(map(_is_invisible, value)) else None


# Letters without a shape, which are no format characters to Unicode.
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"


def _is_invisible(ch: str) -> bool:
    """Whether a character alone shows nothing: blank, control, format (such as U+200B), filler or mark."""
    return ch.isspace() or ch in _FILLERS or unicodedata.category(ch) in ("Cc", "Cf", "Mn", "Me", "Zl", "Zp", "Zs")


def _contradictions(path: Path, pairs: Sequence[Pair]) -> list[str]:
    """A message that counts the pairs that also occur with chosen and rejected swapped."""
    seen = Counter((p.prompt, p.chosen, p.rejected) for p in pairs)
    count = sum(n for (prompt, a, b), n in seen.items() if a != b and (prompt, b, a) in seen)
    return [f"{path.name}: {count} rows contradict another row (chosen and rejected swapped)"] if count else []
