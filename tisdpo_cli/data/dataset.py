"""A split in use as plain values: its files, how their rows are read, and which rows are used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tisdpo_cli.formats import DataFormat


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
class Part:
    """A dataset as a part of a split.

    Attributes:
        dataset: what the user calls it.
        path: file, saved dataset, or glob.
        columns: how its rows are read.
        limit: how many rows from its start are used; all where None.
        share: its share of the split, in proportion to the other shares; every row is used where None.
    """

    dataset: str
    path: Path
    columns: Columns
    limit: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class DatasetSplit:
    """A split in use: the rows of one dataset or of several.

    Attributes:
        parts: where the rows come from.
        limit: how many rows from the start are used, of those that are not held out; all where None.
        hold_out: how many rows are held out for evaluation, or which share of them if below 1; none where None.
        for_test: whether this is the test split, which are the rows held out, if any.
    """

    parts: tuple[Part, ...]
    limit: int | None = None
    hold_out: float | None = None
    for_test: bool = False

    @property
    def name(self) -> str:
        """What it is called in messages."""
        held_out = " (held out)" if self.for_test and self.hold_out is not None else ""
        if len(self.parts) == 1:
            return f"{self.parts[0].path.name}{held_out}"
        return "test mixture" if self.for_test else "mixture"

    @property
    def where(self) -> str:
        """Where it is."""
        return ", ".join(str(path) for path in self.paths)

    @property
    def paths(self) -> list[Path]:
        """What is read."""
        return [part.path for part in self.parts]

    def first(self, part: Part) -> int | None:
        """How many usable rows of a part need to be read; all where None."""
        whole = self.limit if len(self.parts) == 1 and self.hold_out is None else None
        limits = [limit for limit in (part.limit, whole) if limit is not None]
        return min(limits, default=None)
