"""Examples for supervised fine-tuning in Arrow files, as texts and as tokens: written in batches, read as asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, overload

import numpy as np
import pyarrow as pa

from tisdpo_cli.data.arrow_files import ArrowFile, ArrowWriter, IntArray, list_array
from tisdpo_cli.data.messages import Conversation
from tisdpo_cli.data.row_store import RowStore
from tisdpo_cli.data.stored_pairs import consecutive, conversation_of, text_of

_BATCH = 1000
_TEXTS = ("where", "prompt", "response", "conversation")
_TEXT_SCHEMA = pa.schema([(name, pa.string()) for name in _TEXTS])
_TOKEN_SCHEMA = pa.schema(
    [
        ("where", pa.string()),
        ("given", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.int32())),
        ("has_end", pa.int8()),
        ("opening", pa.int32()),
        ("left_out", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Example:
    """A prompt and the response to learn.

    Attributes:
        conversation: messages with one answer, or None for texts; the texts are then for reading only.
    """

    where: str
    prompt: str
    response: str
    conversation: Conversation | None = None


@dataclass(frozen=True)
class EncodedExample:
    """A tokenized example: tokens given as context, tokens to learn, and whether these end the response.

    Attributes:
        opening: number of tokens at the end of the context that a chat template writes before every answer.
        left_out: number of tokens to learn that were truncated.
    """

    where: str
    given: list[int]
    learned: list[int]
    has_end: bool = True
    opening: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class ExampleFile:
    """The examples of one part of a split.

    Attributes:
        rows: the file.
        per_row: examples that each row of the dataset gives: both responses of a pair are two.
        chat: whether they are conversations.
    """

    rows: ArrowFile
    per_row: int
    chat: bool

    def __len__(self) -> int:
        return len(self.rows) // self.per_row

    def prompts(self) -> Iterator[str]:
        """The prompt of each row of the dataset."""
        step = _BATCH * self.per_row
        for begin in range(0, len(self.rows), step):
            yield from self.rows.values("prompt", begin, min(begin + step, len(self.rows)))[:: self.per_row]


def keep_examples(read: Callable[[], Iterable[Example]], per_row: int, store: RowStore) -> ExampleFile:
    """Write examples to a file.

    Args:
        read: gives them; called again where the file cannot be written and memory takes its place.
        per_row: of them come from each row of the dataset.
        store: where the file is kept, for this process alone.
    """
    chat: set[bool] = set()

    def build(stream: BinaryIO) -> None:
        writer, every = ArrowWriter(stream, _TEXT_SCHEMA), iter(read())
        while block := list(islice(every, _BATCH)):
            chat.update(example.conversation is not None for example in block)
            texts = [(e.where, e.prompt, e.response, text_of(e.conversation)) for e in block]
            columns = [pa.array(column, pa.string()) for column in zip(*texts, strict=True)]
            writer.write(pa.record_batch(columns, schema=_TEXT_SCHEMA))
        writer.finish({})

    file = store.file(None, build)
    return ExampleFile(file, per_row, True in chat)


class StoredExamples(Sequence[Example]):
    """Examples of one part or of several, in any order; nothing is read before it is asked for."""

    def __init__(self, parts: Sequence[ExampleFile], rows: IntArray) -> None:
        """Show the examples of some rows.

        Args:
            parts: the files.
            rows: [n], positions of rows of the dataset in all parts one after the other.
        """
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        row_starts, each = np.cumsum([0, *map(len, parts)]), np.array([part.per_row for part in parts])
        of = np.searchsorted(row_starts, rows, side="right") - 1
        first = self._starts[of] + (rows - row_starts[of]) * each[of]
        ends = np.cumsum(each[of])
        self._positions = np.repeat(first - ends + each[of], each[of]) + np.arange(ends[-1] if len(ends) else 0)

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def chat(self) -> bool:
        """Whether they are conversations."""
        return any(part.chat for part in self._parts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        begin, end, step = (index if isinstance(index, slice) else slice(index, index + 1)).indices(len(self))
        if isinstance(index, slice):
            return list(self.between(begin, end)) if step == 1 else [self[i] for i in range(begin, end, step)]
        place = range(len(self))[index]
        return next(self.between(place, place + 1))

    def __iter__(self) -> Iterator[Example]:
        return self.between(0, len(self))

    def between(self, begin: int, end: int) -> Iterator[Example]:
        """The examples from one place to another."""
        for start, stop in consecutive(self._positions, self._starts, begin, end):
            position = int(self._positions[start])
            number = int(np.searchsorted(self._starts, position, side="right")) - 1
            row = position - int(self._starts[number])
            columns = [self._parts[number].rows.values(name, row, row + stop - start) for name in _TEXTS]
            for where, prompt, response, conversation in zip(*columns, strict=True):
                yield Example(where, prompt, response, conversation_of(conversation))


def holds_conversations(examples: Sequence[Example]) -> bool:
    """Whether examples are conversations."""
    if isinstance(examples, StoredExamples):
        return examples.chat
    return any(example.conversation is not None for example in examples)


def keep_encoded(encode: Callable[[], Iterator[EncodedExample]], store: RowStore) -> EncodedExamples:
    """Write tokenized examples to a file.

    Args:
        encode: gives them; called again where the file cannot be written and memory takes its place.
        store: where the file is kept, for this process alone.
    """

    def build(stream: BinaryIO) -> None:
        writer, every = ArrowWriter(stream, _TOKEN_SCHEMA), encode()
        while block := list(islice(every, _BATCH)):
            columns = [
                pa.array([example.where for example in block], pa.string()),
                list_array([example.given for example in block]),
                list_array([example.learned for example in block]),
                pa.array([int(example.has_end) for example in block], pa.int8()),
                pa.array([example.opening for example in block], pa.int32()),
                pa.array([example.left_out for example in block], pa.int32()),
            ]
            writer.write(pa.record_batch(columns, schema=_TOKEN_SCHEMA))
        writer.finish({})

    return EncodedExamples(store.file(None, build))


class EncodedExamples(Sequence[EncodedExample]):
    """Tokenized examples of a file."""

    def __init__(self, file: ArrowFile) -> None:
        self._file = file

    def __len__(self) -> int:
        return len(self._file)

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedExample]: ...
    def __getitem__(self, index: int | slice) -> EncodedExample | list[EncodedExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, row = self._file, range(len(self))[index]
        where, has_end, opening, left_out = (
            file.value(name, row) for name in ("where", "has_end", "opening", "left_out")
        )
        return EncodedExample(where, file.ids("given", row), file.ids("learned", row), bool(has_end), opening, left_out)

    def column(self, name: str) -> IntArray:
        """A column of integers, or the lengths of a column of tokens, [n]."""
        return self._file.numbers(name)

    def lengths(self) -> IntArray:
        """Tokens given and tokens learned of each example, [n, 2]."""
        return np.stack([self.column(name) for name in ("given", "learned")], axis=1)


def example_lengths(examples: Sequence[EncodedExample]) -> IntArray:
    """Tokens given and tokens learned of each example, [n, 2] int64."""
    if isinstance(examples, EncodedExamples):
        return examples.lengths()
    return np.array([[len(e.given), len(e.learned)] for e in examples], np.int64).reshape(-1, 2)


def example_numbers(examples: Sequence[EncodedExample], name: str) -> IntArray:
    """A number or truth value of each example, [n] int64."""
    if isinstance(examples, EncodedExamples):
        return examples.column(name)
    return np.array([int(getattr(example, name)) for example in examples], np.int64)
