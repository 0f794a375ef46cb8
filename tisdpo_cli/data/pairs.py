"""Turns rows into preference pairs: finds the columns, checks types and emptiness. Knows no tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tisdpo_cli.data.data_formats import CONVERTERS, check_scores
from tisdpo_cli.data.dataset import Columns, DatasetSplit
from tisdpo_cli.data.dialogues import dialogue_conversation
from tisdpo_cli.data.hints import SAMPLE_ROWS, UnusedContext, missing_columns, other_shape
from tisdpo_cli.data.layouts import SAMPLE, Layout, Values, suggested_option
from tisdpo_cli.data.messages import Conversation, is_conversational, preference_conversation
from tisdpo_cli.data.mixture import Rows, combine, short_hash
from tisdpo_cli.data.reader import content_of, count_rows, read_rows, shown_path
from tisdpo_cli.data.row_store import RowStore, no_progress
from tisdpo_cli.data.rows import BadRow, Row, emptiness, handle_bad_rows
from tisdpo_cli.data.stored_pairs import Pair, PairFile, PairWriter, StoredPairs
from tisdpo_cli.errors import DataError

# Files from this number of rows on show their progress, and after how many rows.
_SHOWN_FROM, _SHOWN_EVERY = 20_000, 500


@dataclass
class Pairs:
    """The pairs of a split, and messages for the user."""

    pairs: StoredPairs
    notices: list[str] = field(default_factory=list)


def read_split_pairs(split: DatasetSplit, on_bad_row: str, store: RowStore | None = None) -> Pairs:
    """Read the preference pairs of a split that are in use.

    Args:
        split: where they come from.
        on_bad_row: `error` or `skip`.
        store: where they are kept, or None for the user's cache directory.

    Raises:
        DataError: see `read_pairs`; or parts of the split do not fit together.
        UsageError: no row is left.
    """
    store = store or RowStore()
    read = [read_pairs(part.path, part.columns, on_bad_row, split.first(part), store) for part in split.parts]
    files = [file for part in read for file in part.pairs.parts]
    if len(files) > 1:
        named = zip(files, split.parts, strict=True)
        files = [replace(file, mixed=(part.columns, part.dataset)) for file, part in named]
    together = StoredPairs(files)
    positions, notices = combine(split, [Rows(len(file), file.chat) for file in files], together.prompts)
    return Pairs(StoredPairs(files, positions), [*part_notices(split, [part.notices for part in read]), *notices])


def part_notices(split: DatasetSplit, notices: Sequence[Sequence[str]]) -> list[str]:
    """The notices of all parts, by their paths where their names do not tell them apart."""
    if len(split.parts) == 1:
        return list(notices[0])
    named = zip(split.parts, notices, strict=True)
    return [
        f"{part.path}{line.removeprefix(part.path.name)}" if line.startswith(f"{part.path.name}:") else line
        for part, lines in named
        for line in lines
    ]


def read_pairs(
    path: Path, columns: Columns, on_bad_row: str, first: int | None = None, store: RowStore | None = None
) -> Pairs:
    """Read the preference pairs of a file, as a stream.

    Args:
        path: file, saved dataset or glob.
        columns: column names.
        on_bad_row: `error` or `skip`.
        first: how many pairs to read from the start; all where None.
        store: where they are kept, or None for the user's cache directory.

    Raises:
        DataError: a row is invalid and `on_bad_row` is `error`; a column is missing in all rows; there are no rows; the
            file changed while it was read.
    """
    content = content_of(path)
    store = store or RowStore()

    def build(stream: BinaryIO) -> None:
        writer = PairWriter(stream)
        reading = _Reading(path, columns, writer)
        rows = count_rows(path) or 0
        show = store.progress if rows >= _SHOWN_FROM else no_progress
        with show("reading", rows if first is None else min(rows, first), 0, "rows") as progress:
            for row in read_rows(path, reading.notices):
                reading.take(row)
                if reading.total % _SHOWN_EVERY == 0:
                    progress.advance(_SHOWN_EVERY, {})
                if writer.count == first:
                    break
            progress.advance(reading.total % _SHOWN_EVERY, {})
        about = reading.finish(on_bad_row)
        # What was read would be kept as the rows of what the file held before.
        if content_of(path) != content:
            raise DataError(
                "changed while it was read", where=shown_path(path), fix="run the command again when it is complete"
            )
        writer.finish(about)

    depends_on = {**content, "columns": vars(columns), "on_bad_row": on_bad_row, "first": first}
    file = store.file(depends_on, build)
    return Pairs(StoredPairs([PairFile(file, depends_on)]), list(file.about["notices"]))


class _Reading:
    """The rows of a file so far."""

    def __init__(self, path: Path, columns: Columns, writer: PairWriter) -> None:
        self.path, self.columns, self.writer = path, columns, writer
        self.bad: list[BadRow] = []
        self.notices: list[str] = []
        # Rows as they are before the first pair, and the first ones as pairs.
        self.sample: list[Values] = []
        self.objects: list[Row] = []
        self.total = self.ties = 0
        self.chat = columns.dialogue
        self.missing = dict(columns.named())
        self.layout = Layout(path.name, columns)
        self.unused = UnusedContext()
        self.contradictions = _Contradictions()

    def take(self, raw: Row | BadRow) -> None:
        """Add a row."""
        self.total += 1
        if isinstance(raw, Row) and not self.writer.count and len(self.sample) < SAMPLE:
            self.sample.append(raw.columns)
        row = raw if isinstance(raw, BadRow) else _as_pair(raw, self.columns)
        if row is None:
            self.ties += 1
            return
        if isinstance(row, Row):
            # The first row decides what the file holds.
            names = list(self.columns.named().values())
            self.chat = self.chat or (not self.objects and is_conversational(row.columns, names))
            self.missing = {role: name for role, name in self.missing.items() if name not in row.columns}
            if len(self.objects) < SAMPLE_ROWS:
                self.objects.append(row)
        pair = row if isinstance(row, BadRow) else _pair(row, self.columns, self.writer.count, self.chat)
        self.bad.append(pair) if isinstance(pair, BadRow) else self._keep(pair)

    def _keep(self, pair: Pair) -> None:
        self.writer.add(pair)
        self.layout.add(pair.row.columns)
        self.unused.add(pair.row.columns)
        self.contradictions.add(pair)

    def finish(self, on_bad_row: str) -> list[str]:
        """Check what is wrong with the file and with its rows, and return messages for the user.

        Raises:
            DataError: there are invalid rows that are not to be skipped; or see `_check`.
        """
        self._check()
        columns, name = self.columns, self.path.name
        notices = [*self.notices, *handle_bad_rows(self.bad, self.total, on_bad_row)]
        used = [*columns.named().values(), *(_CHAT_COLUMNS if self.chat else ())]
        layout, unused = self.layout.notices(self.chat), self.unused.notices(name, used)
        return [*notices, *layout, *unused, *self.contradictions.notices(name)]

    def _check(self) -> None:
        """Check what is wrong with the file rather than with a row.

        Raises:
            DataError: it has no rows, only ties, another shape, or a column is missing in all rows.
        """
        shown, columns = shown_path(self.path), self.columns
        if not self.total:
            raise DataError("the file has no rows", where=shown)
        if self.ties == self.total:
            raise DataError(f"all {self.total} rows are ties: no answer is better", where=shown)
        if self.ties:
            self.notices.append(f"{self.path.name}: {self.ties} rows dropped: their answers are rated the same")
        needed = {role: name for role, name in columns.named().items() if role != "prompt" or not self.chat}
        missing = [role for role in needed if role in self.missing]
        error = missing_columns(self.path, shown, self.objects, needed, missing) if self.objects and missing else None
        unreadable = len(self.bad) == self.total
        option = suggested_option(self.sample, columns) if error is not None or unreadable else None
        if option is not None:
            what = f"no row is read as {columns.data_format}: {self.bad[0].why}" if error is None else error.what
            raise DataError(what, where=shown, fix=f"try {option}")
        if error is None and unreadable:
            error = other_shape(self.path, shown)
        if error is not None:
            raise error


# Columns that conversations use besides those of the pair.
_CHAT_COLUMNS = ("system", "tools", "conversations", "chat_template_kwargs")


def _as_pair(row: Row, columns: Columns) -> Row | BadRow | None:
    """A row with its pair in the columns of pairs, or None if no answer is better than the other."""
    if columns.data_format == "pairs":
        return row
    try:
        if columns.data_format == "scored-pairs":
            return row if check_scores(row.columns) else None
        converted = CONVERTERS[columns.data_format].apply(row.columns)
    except DataError as error:
        return BadRow(row.where, error.what)
    return None if converted is None else Row(row.where, converted)


def _pair(row: Row, columns: Columns, index: int, chat: bool) -> Pair | BadRow:
    names = (columns.prompt, columns.chosen, columns.rejected)
    if not chat:
        problem = _find_problem(row, columns)
        prompt, chosen, rejected = (row.columns.get(name) for name in names)
        return problem or Pair(index, str(prompt), str(chosen), str(rejected), row)
    if not columns.dialogue and not is_conversational(row.columns, names):
        return BadRow(row.where, "a row of texts in a file of conversations; use one file per kind")
    read = dialogue_conversation if columns.dialogue else preference_conversation
    try:
        conversation = read(row.columns, *names)
    except DataError as error:
        return BadRow(row.where, error.what)
    chosen, rejected = (str(answer["content"]) for answer in conversation.answers)
    return Pair(index, transcript(conversation), chosen, rejected, row, conversation)


def transcript(conversation: Conversation) -> str:
    """Return the prompt of a conversation as text for people to read."""
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in conversation.prompt)


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
        return "is a list; a string is needed, as in the first row of the file"
    if not isinstance(value, str):
        return f"is {'null' if value is None else type(value).__name__}; a string is needed"
    return emptiness(value)


class _Contradictions:
    """Counts the pairs that also occur with chosen and rejected swapped, by hashes of 8 bytes."""

    def __init__(self) -> None:
        self._pairs, self._swapped = array("Q"), array("Q")

    def add(self, pair: Pair) -> None:
        """Add a pair."""
        prompt, chosen, rejected = (text.encode() for text in (pair.prompt, pair.chosen, pair.rejected))
        self._pairs.append(short_hash(prompt, chosen, rejected))
        # Equal responses contradict nothing.
        self._swapped.append(short_hash(prompt, rejected, chosen) if chosen != rejected else 0)

    def notices(self, name: str) -> list[str]:
        """A message that counts them."""
        pairs, swapped = (np.frombuffer(hashes, np.uint64) for hashes in (self._pairs, self._swapped))
        count = int(np.isin(swapped, pairs).sum())
        return [f"{name}: {count} rows contradict another row (chosen and rejected swapped)"] if count else []
