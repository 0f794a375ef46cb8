"""Splits of a preference dataset, read, tokenised and sorted into what can be trained and what cannot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tisdpo_cli.data.pairs import Columns, Pair, read_pairs
from tisdpo_cli.data.tokens import EncodedPair, Limits, Vocabulary, encode_pairs
from tisdpo_cli.errors import DataError


@dataclass
class Split:
    """One split: its pairs as text and as tokens, side by side, and what there is to say."""

    path: Path
    pairs: list[Pair]
    encoded: list[EncodedPair]
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReadOptions:
    """How rows are read and cut.

    Attributes:
        columns: names of the columns.
        on_bad_row: `error` or `skip`.
        limits: maximum lengths.
    """

    columns: Columns
    on_bad_row: str
    limits: Limits


def read_split(path: Path, options: ReadOptions, vocabulary: Vocabulary, first: int | None = None) -> Split:
    """Read and tokenise a split, every usable row of it.

    Args:
        path: its file.
        options: columns, limits, and what to do with bad rows.
        vocabulary: the tokenizer of the model in use.
        first: read only this many rows from the start, where given.

    Raises:
        DataError: rows cannot be used.
    """
    read = read_pairs(path, options.columns, options.on_bad_row)
    pairs = read.pairs[:first] if first is not None else read.pairs
    encoded, cuts = encode_pairs(
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        [pair.rejected for pair in pairs],
        [pair.row.where for pair in pairs],
        vocabulary,
        options.limits,
    )
    unprompted = next((pair for pair in encoded if not pair.prompt), None)
    if unprompted is not None:
        raise DataError(
            "the prompt has no tokens, so the first response token cannot be scored", where=unprompted.where
        )
    said = [f"{path.name}: {sentence}" for sentence in cuts.sentences(options.limits)]
    return Split(path, pairs, encoded, [*read.notices, *said])


def drop_untrainable(split: Split) -> tuple[list[EncodedPair], list[str]]:
    """The pairs that teach something, and sentences that count the others.

    Raises:
        DataError: no pair is left.
    """
    equal = [p for p in split.encoded if p.chosen.ids == p.rejected.ids]
    empty = [p for p in split.encoded if p.chosen.ids != p.rejected.ids and not (p.chosen.kept and p.rejected.kept)]
    dropped = {p.index for p in equal} | {p.index for p in empty}
    kept = [p for p in split.encoded if p.index not in dropped]
    said = []
    if equal:
        said.append(
            f"{split.path.name}: {len(equal)} pairs dropped, their responses are equal (after tokenising and cutting)"
        )
    if empty:
        said.append(f"{split.path.name}: {len(empty)} pairs dropped, the cut left no response token")
    if not kept:
        raise DataError(
            f"none of {len(split.encoded)} pairs can be trained: {len(equal)} have equal responses, {len(empty)} no "
            "response token after the cut",
            where=str(split.path),
            fix="look at the data, or raise --max-length",
        )
    return kept, said
