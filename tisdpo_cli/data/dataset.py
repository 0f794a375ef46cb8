"""What a split is made of: files, how their rows are read, and which rows are used. Reads no files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tisdpo_cli.errors import UsageError
from tisdpo_cli.formats import DataFormat

T = TypeVar("T")


@dataclass(frozen=True)
class Columns:
    """Column names of a preference dataset.

    Attributes:
        dialogue: whether the texts are dialogues with turns of "Human:" and "Assistant:", to be read as messages.
        data_format: what a row holds.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    dialogue: bool = False
    data_format: DataFormat = "pairs"

    def named(self) -> dict[str, str]:
        """Return role to column name."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class RowChoice:
    """Which of the usable rows of a file are used.

    Attributes:
        limit: how many from the start, of those that are not held out; all where None.
        hold_out: how many rows are held out for evaluation, or which share of them if below 1; none where None.
        held_out: whether the rows in use are those held out.
    """

    limit: int | None = None
    hold_out: float | None = None
    held_out: bool = False

    def enough(self, count: int) -> bool:
        """Whether the rest of the file need not be read after so many usable rows."""
        return self.limit is not None and self.hold_out is None and count >= self.limit

    def split(self, rows: Sequence[T], where: str) -> tuple[list[T], list[T]]:
        """Return the rows that are not held out, up to the limit, and those that are, both in order.

        The same positions are held out in every run.

        Raises:
            UsageError: no row is left.
        """
        held: set[int] = set()
        if self.hold_out is not None:
            count = round(self.hold_out * len(rows)) if self.hold_out < 1 else int(self.hold_out)
            if not 0 < count < len(rows):
                what = f"holds out {count} of {len(rows)} rows of {where}"
                raise UsageError(what, where="--eval-size", fix="leave rows for both training and evaluation")
            held = set(sorted(range(len(rows)), key=_draw)[:count])
        rest = [row for i, row in enumerate(rows) if i not in held]
        return rest[: self.limit], [row for i, row in enumerate(rows) if i in held]


def _draw(position: int) -> bytes:
    """A uniform draw for a position, the same on every machine."""
    return hashlib.blake2b(position.to_bytes(8, "little"), digest_size=8).digest()


EVERY_ROW = RowChoice()


@dataclass(frozen=True)
class DatasetSplit:
    """A split in use.

    Attributes:
        path: file, saved dataset, or glob.
        columns: how its rows are read.
        rows: which of them are used.
    """

    path: Path
    columns: Columns
    rows: RowChoice = EVERY_ROW

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.path.name} (held out)" if self.rows.held_out else self.path.name

    @property
    def where(self) -> str:
        """Where it is."""
        return str(self.path)

    @property
    def paths(self) -> list[Path]:
        """What is read."""
        return [self.path]
