"""Turns rows into preference pairs: finds the columns, checks types and emptiness. Knows no tokens."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tisdpo_cli.data.reader import read_rows
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
    for row in read_rows(path):
        total += 1
        problem = row if isinstance(row, BadRow) else _find_problem(row, columns)
        if problem is not None:
            bad.append(problem)
        if isinstance(row, Row):
            rows.append((row, problem is None))
    if not total:
        raise DataError("the file has no rows", where=str(path))
    _require_columns(path, [row for row, _ in rows], columns)
    notices = handle_bad_rows(bad, total, on_bad_row)
    valid = [row for row, is_valid in rows if is_valid]
    pairs = [
        Pair(i, row.columns[columns.prompt], row.columns[columns.chosen], row.columns[columns.rejected], row)
        for i, row in enumerate(valid)
    ]
    return Pairs(pairs, [*notices, *_contradictions(path, pairs)])


def _require_columns(path: Path, rows: Sequence[Row], columns: Columns) -> None:
    """Raise an error if no row has a column, with the option that sets its name."""
    for role, name in columns.named().items():
        if rows and not any(name in row.columns for row in rows):
            present = sorted({key for row in rows[:100] for key in row.columns})
            others = [key for key in present if key not in columns.named().values()]
            hint = f"try --{role}-column {shlex.quote(_guess(role, others))}" if others else f"each row needs {role!r}"
            what = f"expected columns {', '.join(columns.named().values())}; found {', '.join(present) or 'none'}"
            raise DataError(what, where=str(path), fix=hint)


_OTHER_NAMES = {
    "prompt": ("instruction", "question", "query", "input", "context"),
    "chosen": ("chosen", "preferred", "better", "win", "accept"),
    "rejected": ("reject", "dispreferred", "worse", "lose"),
}


def _guess(role: str, names: Sequence[str]) -> str:
    """The column that most likely has a role."""
    return next((name for word in _OTHER_NAMES[role] for name in names if word in name.lower()), names[0])


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
        return "is a list; a string is needed (for a conversation: the text rendered by the model's chat template)"
    if not isinstance(value, str):
        return f"is {'null' if value is None else type(value).__name__}; a string is needed"
    return None if value.strip() else "is empty"


def _contradictions(path: Path, pairs: Sequence[Pair]) -> list[str]:
    """A message that counts the pairs that also occur with chosen and rejected swapped."""
    seen = Counter((p.prompt, p.chosen, p.rejected) for p in pairs)
    count = sum(n for (prompt, a, b), n in seen.items() if a != b and (prompt, b, a) in seen)
    return [f"{path.name}: {count} rows contradict another row (chosen and rejected swapped)"] if count else []
