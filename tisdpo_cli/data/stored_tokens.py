"""Tokenized pairs in Arrow files: written in batches, read as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa

from tisdpo_cli.data.arrow_files import ArrowFile, IntArray, list_array
from tisdpo_cli.data.tokens import EncodedPair, Response

_SIDES = ("chosen", "rejected")
SCHEMA = pa.schema(
    [
        # Position of the pair among those that were read: some of them may not be rendered by the chat template.
        ("row", pa.int64()),
        ("where", pa.string()),
        ("prompt", pa.list_(pa.int32())),
        *((side, pa.list_(pa.int32())) for side in _SIDES),
        *((f"{side}_eos", pa.int8()) for side in _SIDES),
        *((f"{side}_uncut", pa.int32()) for side in _SIDES),
        ("equal", pa.int8()),
        ("opening", pa.int32()),
        ("framed", pa.list_(pa.list_(pa.int32()))),
    ]
)


def token_batch(pairs: Sequence[EncodedPair], rows: Sequence[int]) -> pa.RecordBatch:
    """Pairs as rows of a file.

    Args:
        pairs: tokenized pairs.
        rows: position of each among the pairs that were read.
    """
    sides = [[pair.chosen for pair in pairs], [pair.rejected for pair in pairs]]
    columns = [
        pa.array(rows, pa.int64()),
        pa.array([pair.where for pair in pairs], pa.string()),
        list_array([pair.prompt for pair in pairs]),
        *(list_array([response.ids for response in side]) for side in sides),
        *(pa.array([int(response.has_eos) for response in side], pa.int8()) for side in sides),
        *(pa.array([response.uncut for response in side], pa.int32()) for side in sides),
        pa.array([int(pair.chosen.ids == pair.rejected.ids) for pair in pairs], pa.int8()),
        pa.array([pair.opening for pair in pairs], pa.int32()),
        pa.array([list(pair.framed) for pair in pairs], pa.list_(pa.list_(pa.int32()))),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


class TokenColumns:
    """What is known of all pairs of a file without their tokens, [n] each, read when it is first asked for."""

    def __init__(self, file: ArrowFile) -> None:
        self._file = file
        self._known: dict[str, IntArray] = {}

    def __call__(self, name: str) -> IntArray:
        """A column of integers, or the lengths of a column of tokens."""
        if name not in self._known:
            self._known[name] = self._file.numbers(name)
        return self._known[name]


class EncodedPairs(Sequence[EncodedPair]):
    """Tokenized pairs of a file, all of them or some, in any order, perhaps with their sides swapped."""

    def __init__(
        self, file: ArrowFile, places: IntArray | None = None, swaps: bool = False, columns: TokenColumns | None = None
    ) -> None:
        """Show pairs of a file; all of them, in order, without places."""
        self._file, self._swaps = file, swaps
        self._columns = columns or TokenColumns(file)
        self.places = np.arange(len(file)) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> EncodedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedPair]: ...
    def __getitem__(self, index: int | slice) -> EncodedPair | list[EncodedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, place = self._file, int(self.places[index])
        chosen, rejected = (
            Response(file.ids(side, place), bool(file.value(f"{side}_eos", place)), file.value(f"{side}_uncut", place))
            for side in _SIDES
        )
        framed = tuple(file.value("framed", place))
        where, opening = file.value("where", place), file.value("opening", place)
        pair = EncodedPair(place, where, file.ids("prompt", place), chosen, rejected, opening, framed)
        return pair.swapped() if self._swaps else pair

    def select(self, indices: IntArray) -> EncodedPairs:
        """The pairs at these indices; each keeps its `index`."""
        return EncodedPairs(self._file, self.places[indices], self._swaps, self._columns)

    def swapped(self) -> EncodedPairs:
        """The pairs with chosen and rejected swapped."""
        return EncodedPairs(self._file, self.places, not self._swaps, self._columns)

    def column(self, name: str) -> IntArray:
        """A column of integers, or the lengths of a column of tokens, [n]; sides as they are in the file."""
        return self._columns(name)[self.places]

    def lengths(self) -> IntArray:
        """Tokens of the prompt and both responses after truncation, [n, 3]."""
        sides = reversed(_SIDES) if self._swaps else _SIDES
        return np.stack([self.column(name) for name in ("prompt", *sides)], axis=1)


def pair_lengths(pairs: Sequence[EncodedPair]) -> IntArray:
    """Tokens of the prompt and both responses of each pair, [n, 3] int64."""
    if isinstance(pairs, EncodedPairs):
        return pairs.lengths()
    lengths = [[len(pair.prompt), len(pair.chosen.ids), len(pair.rejected.ids)] for pair in pairs]
    return np.array(lengths, np.int64).reshape(-1, 3)


def untrainable(pairs: Sequence[EncodedPair]) -> tuple[Any, Any]:
    """Which pairs have equal responses, and which others have one without a token beside its EOS: [n] bool each."""
    if isinstance(pairs, EncodedPairs):
        equal = pairs.column("equal").astype(bool)
        kept = [pairs.column(side) - pairs.column(f"{side}_eos") for side in _SIDES]
    else:
        equal = np.array([pair.chosen.ids == pair.rejected.ids for pair in pairs], bool)
        kept = [np.array([getattr(pair, side).kept for pair in pairs], np.int64) for side in _SIDES]
    return equal, ~equal & ((kept[0] == 0) | (kept[1] == 0))


def swapped_pairs(pairs: Sequence[EncodedPair]) -> Sequence[EncodedPair]:
    """The pairs with chosen and rejected swapped."""
    return pairs.swapped() if isinstance(pairs, EncodedPairs) else [pair.swapped() for pair in pairs]


def uncut_lengths(pairs: Sequence[EncodedPair]) -> Iterator[tuple[int, int]]:
    """Tokens of both responses of each pair before truncation, without the EOS."""
    if isinstance(pairs, EncodedPairs):
        chosen, rejected = (pairs.column(f"{side}_uncut").tolist() for side in _SIDES)
        return zip(chosen, rejected, strict=True)
    return ((pair.chosen.uncut, pair.rejected.uncut) for pair in pairs)


def select_pairs(pairs: Sequence[EncodedPair], indices: IntArray) -> Sequence[EncodedPair]:
    """The pairs at these indices."""
    return pairs.select(indices) if isinstance(pairs, EncodedPairs) else [pairs[i] for i in indices.tolist()]
