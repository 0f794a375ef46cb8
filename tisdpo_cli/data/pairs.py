"""Rows become preference pairs: columns found, types and emptiness checked. Knows no tokens."""

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
    """The names of the columns of a preference dataset."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"

    def named(self) -> dict[str, str]:
        """Role to column name."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class Pair:
    """One preference pair.

    Attributes:
        index: position among the rows that are kept, the row number of everything that is seeded by row.
        row: the row as read, with all its columns.
    """

    index: int
    prompt: str
    chosen: str
    rejected: str
    row: Row


@dataclass
class Pairs:
    """The pairs of a split and what there is to say about them."""

    pairs: list[Pair]
    notices: list[str] = field(default_factory=list)


def read_pairs(path: Path, columns: Columns, on_bad_row: str) -> Pairs:
    """Read a split.

    Raises:
        DataError: a row cannot be used and `on_bad_row` is `error`; a column is missing everywhere; no row.
    """
    rows, bad, total = [], [], 0
    for row in read_rows(path):
        total += 1
        fault = row if isinstance(row, BadRow) else _fault(row, columns)
        if fault is not None:
            bad.append(fault)
        if isinstance(row, Row):
            rows.append((row, fault is None))
    if not total:
        raise DataError("the file has no rows", where=str(path))
    _require_columns(path, [row for row, _ in rows], columns)
    notices = handle_bad_rows(bad, total, on_bad_row)
    kept = [row for row, usable in rows if usable]
    pairs = [
        Pair(i, row.columns[columns.prompt], row.columns[columns.chosen], row.columns[columns.rejected], row)
        for i, row in enumerate(kept)
    ]
    return Pairs(pairs, [*notices, *_contradictions(path, pairs)])


def _require_columns(path: Path, rows: Sequence[Row], columns: Columns) -> None:
    """Stop where a column is in no row at all, naming the option that tells where it is."""
    for role, name in columns.named().items():
        if rows and not any(name in row.columns for row in rows):
            found = sorted({key for row in rows[:100] for key in row.columns})
            spare = [key for key in found if key not in columns.named().values()]
            hint = f"try --{role}-column {shlex.quote(_likely(role, spare))}" if spare else f"each row needs {role!r}"
            wanted = ", ".join(columns.named().values())
            raise DataError(f"expected columns {wanted}; found {', '.join(found) or 'none'}", where=str(path), fix=hint)


_OTHER_NAMES = {
    "prompt": ("instruction", "question", "query", "input", "context"),
    "chosen": ("chosen", "preferred", "better", "win", "accept"),
    "rejected": ("reject", "dispreferred", "worse", "lose"),
}


def _likely(role: str, spare: Sequence[str]) -> str:
    return next((key for word in _OTHER_NAMES[role] for key in spare if word in key.lower()), spare[0])


def _fault(row: Row, columns: Columns) -> BadRow | None:
    for name in columns.named().values():
        if name not in row.columns:
            return BadRow(row.where, f"column {name!r} is missing")
        problem = text_problem(row.columns[name])
        if problem:
            return BadRow(row.where, f"{name!r} {problem}")
    return None


def text_problem(value: Any) -> str | None:
    """Why a value cannot be the text of a prompt or response, or None."""
    if isinstance(value, list):
        return "is a list; a string is needed (of a conversation: what the model's chat template makes of it)"
    if not isinstance(value, str):
        return f"is {'null' if value is None else type(value).__name__}; a string is needed"
    return None if value.strip() else "is empty"


def _contradictions(path: Path, pairs: Sequence[Pair]) -> list[str]:
    """A notice that counts pairs which also stand the other way round."""
    seen = Counter((p.prompt, p.chosen, p.rejected) for p in pairs)
    count = sum(n for (prompt, a, b), n in seen.items() if a != b and (prompt, b, a) in seen)
    return [f"{path.name}: {count} rows contradict another row (the same pair the other way round)"] if count else []
