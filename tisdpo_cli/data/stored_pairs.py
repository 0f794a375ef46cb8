"""Preference pairs in Arrow files: written row by row, read as they are asked for. Knows no tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa

from tisdpo_cli.data.arrow_files import ArrowFile, ArrowWriter, IntArray
from tisdpo_cli.data.dataset import Columns
from tisdpo_cli.data.messages import Conversation
from tisdpo_cli.data.rows import Row

# Rows and bytes of text in a batch, whichever is reached first.
_BATCH_ROWS, _BATCH_BYTES = 1000, 2**24
_TEXTS = ("where", "prompt", "chosen", "rejected", "columns", "conversation")
_SCHEMA = pa.schema([(name, pa.string()) for name in _TEXTS])
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Pair:
    """One preference pair.

    Attributes:
        index: position among the valid rows, which seeds everything random by row.
        prompt: text of the prompt.
        chosen: text of the chosen response.
        rejected: text of the rejected response.
        row: the row with all its columns.
        conversation: the messages, or None for a row of texts; the texts are then for reading only.
    """

    index: int
    prompt: str
    chosen: str
    rejected: str
    row: Row
    conversation: Conversation | None = None


class PairWriter:
    """Writes pairs to a file.

    Attributes:
        count: pairs so far.
        names: names of the columns of their rows.
        chat: whether they hold conversations.
    """

    def __init__(self, stream: BinaryIO) -> None:
        """Begin a file; see `ArrowWriter`."""
        self._writer = ArrowWriter(stream, _SCHEMA)
        self._waiting: list[tuple[str | None, ...]] = []
        self._bytes = self.count = 0
        self.names: set[str] = set()
        self.chat = False

    def add(self, pair: Pair) -> None:
        """Add a pair."""
        conversation = text_of(pair.conversation)
        columns = _JSON.encode(pair.row.columns)
        texts = (pair.row.where, pair.prompt, pair.chosen, pair.rejected, columns, conversation)
        self._waiting.append(texts)
        self._bytes += 2 * len(columns) + len(conversation or "")
        self.count += 1
        self.names.update(pair.row.columns)
        self.chat = self.chat or pair.conversation is not None
        if len(self._waiting) >= _BATCH_ROWS or self._bytes >= _BATCH_BYTES:
            self._flush()

    def finish(self, notices: Sequence[str]) -> None:
        """End the file, with messages for the user."""
        self._flush()
        self._writer.finish({"notices": list(notices), "names": sorted(self.names), "chat": self.chat})

    def _flush(self) -> None:
        columns = zip(*self._waiting, strict=True) if self._waiting else [()] * len(_TEXTS)
        self._writer.write(pa.record_batch([pa.array(texts, pa.string()) for texts in columns], schema=_SCHEMA))
        self._waiting, self._bytes = [], 0


@dataclass(frozen=True)
class PairFile:
    """The pairs of one part of a split.

    Attributes:
        rows: the file.
        depends_on: what its content depends on.
        mixed: where the part belongs to a mixture, how its rows were read and what the user calls it.
    """

    rows: ArrowFile
    depends_on: Any
    mixed: tuple[Columns, str] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def chat(self) -> bool:
        """Whether it holds conversations."""
        return bool(self.rows.about["chat"])


class StoredPairs(Sequence[Pair]):
    """Pairs of one part or of several, some of them or all, in any order; nothing is read before it is asked for.

    Attributes:
        parts: the files.
        positions: [n] int64, which pair comes where: its position in all parts one after the other.
    """

    def __init__(self, parts: Sequence[PairFile], positions: IntArray | None = None) -> None:
        """Show pairs of files; all of them, in order, without positions."""
        self.parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.positions = np.arange(self._starts[-1]) if positions is None else positions

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        part, row = self._place(place)
        texts = [part.rows.value(name, row) for name in _TEXTS]
        return _pair(place, texts, part)

    def __iter__(self) -> Iterator[Pair]:
        return self.between(0, len(self))

    def between(self, begin: int, end: int) -> Iterator[Pair]:
        """The pairs from one place to another, in blocks of consecutive rows where there are some."""
        for start, stop in self._runs(begin, end):
            part, row = self._place(start)
            columns = [part.rows.values(name, row, row + stop - start) for name in _TEXTS]
            for offset, texts in enumerate(zip(*columns, strict=True)):
                yield _pair(start + offset, texts, part)

    def prompts(self) -> Iterator[str]:
        """The prompt of each pair."""
        for start, stop in self._runs(0, len(self)):
            part, row = self._place(start)
            yield from part.rows.values("prompt", row, row + stop - start)

    def first(self, count: int | None) -> StoredPairs:
        """The first pairs; all of them where None."""
        return self if count is None else StoredPairs(self.parts, self.positions[:count])

    def select(self, places: IntArray) -> StoredPairs:
        """The pairs at these places, numbered anew."""
        return StoredPairs(self.parts, self.positions[places])

    @property
    def chat(self) -> bool:
        """Whether they are conversations; a split is all one or all the other."""
        return any(part.chat for part in self.parts if len(part))

    @property
    def depends_on(self) -> list[Any] | None:
        """What they depend on: the files, how they were read, and which rows are used; None if that is not known."""
        known = [part.depends_on for part in self.parts]
        mixed = [part.mixed and [vars(part.mixed[0]), part.mixed[1]] for part in self.parts]
        used = hashlib.sha256(self.positions.astype("<i8").tobytes()).hexdigest()
        return None if None in known else [known, mixed, used]

    def bytes_of_rows(self) -> int:
        """Roughly how many bytes of files these pairs take."""
        return sum(part.rows.size for part in self.parts) * len(self) // max(1, int(self._starts[-1]))

    def may_have(self, names: Iterable[str]) -> bool:
        """Whether any file has a column of these names."""
        wanted = set(names)
        return any(not wanted.isdisjoint(part.rows.about["names"]) for part in self.parts)

    def _place(self, place: int) -> tuple[PairFile, int]:
        position = int(self.positions[place])
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.parts[number], position - int(self._starts[number])

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        return consecutive(self.positions, self._starts, begin, end)


def consecutive(positions: IntArray, starts: IntArray, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Places in blocks whose rows follow one another in one file.

    Args:
        positions: [n], the row at each place: its position in all files one after the other.
        starts: [files + 1], position of the first row of each file, and the number of all rows.
        begin: the first place.
        end: the place after the last one.
    """
    while begin < end:
        block = positions[begin : min(end, begin + _BATCH_ROWS)]
        first = int(block[0])
        limit = int(starts[np.searchsorted(starts, first, side="right")]) - first
        same = np.flatnonzero(block != first + np.arange(len(block)))
        length = min(int(same[0]) if len(same) else len(block), limit)
        yield begin, begin + length
        begin += length


def holds_conversations(pairs: Sequence[Pair]) -> bool:
    """Whether any pair is a conversation."""
    return pairs.chat if isinstance(pairs, StoredPairs) else any(pair.conversation is not None for pair in pairs)


def rows_with(pairs: Sequence[Pair], names: Iterable[str]) -> Iterator[Row]:
    """The rows of pairs; none where it is known that no row has any column of these names."""
    if isinstance(pairs, StoredPairs) and not pairs.may_have(names):
        return iter(())
    return (pair.row for pair in pairs)


def _pair(index: int, texts: Sequence[str], part: PairFile) -> Pair:
    where, prompt, chosen, rejected, columns, conversation = texts
    pair = Pair(index, prompt, chosen, rejected, Row(where, json.loads(columns)), conversation_of(conversation))
    return pair if part.mixed is None else _alike(pair, *part.mixed)


def text_of(conversation: Conversation | None) -> str | None:
    """A conversation as JSON."""
    return None if conversation is None else _JSON.encode(vars(conversation))


def conversation_of(text: str | None) -> Conversation | None:
    """A conversation from `text_of`."""
    if text is None:
        return None
    values = json.loads(text)
    return Conversation(**{**values, "answers": tuple(values["answers"])})


# The column of a row of a mixture that names its dataset.
_SOURCE = "mixture_source"


def _alike(pair: Pair, read_as: Columns, dataset: str) -> Pair:
    """A pair of a mixture: its row has the columns that a row of any other dataset has."""
    columns, plain = pair.row.columns, Columns().named()
    others = {name: value for name, value in columns.items() if name not in read_as.named().values()}
    used = {plain[role]: columns[name] for role, name in read_as.named().items() if name in columns}
    if read_as.dialogue and pair.conversation is not None:
        used = {"prompt": pair.conversation.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return replace(pair, row=Row(pair.row.where, {**others, **used, _SOURCE: dataset}))
