"""Turns rows into preference pairs: finds the columns, checks types and emptiness. Knows no tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tisdpo_cli.data.data_formats import CONVERTERS, check_scores
from tisdpo_cli.data.dataset import Columns, DatasetSplit, Part
from tisdpo_cli.data.dialogues import dialogue_conversation
from tisdpo_cli.data.hints import missing_columns, other_shape, unused_context
from tisdpo_cli.data.layouts import SAMPLE, Values, layout_notices, suggested_option
from tisdpo_cli.data.messages import Conversation, is_conversational, preference_conversation
from tisdpo_cli.data.mixture import combine
from tisdpo_cli.data.reader import read_rows, shown_path
from tisdpo_cli.data.rows import BadRow, Row, emptiness, handle_bad_rows
from tisdpo_cli.errors import DataError


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


@dataclass
class Pairs:
    """The pairs of a split, and messages for the user."""

    pairs: list[Pair]
    notices: list[str] = field(default_factory=list)


def read_split_pairs(split: DatasetSplit, on_bad_row: str) -> Pairs:
    """Read the preference pairs of a split that are in use.

    Args:
        split: where they come from.
        on_bad_row: `error` or `skip`.

    Raises:
        DataError: see `read_pairs`; or parts of the split do not fit together.
        UsageError: no row is left.
    """
    read = [read_pairs(part.path, part.columns, on_bad_row, split.first(part)) for part in split.parts]
    alone = len(split.parts) == 1
    parts = [
        part.pairs if alone else [_alike(pair, source) for pair in part.pairs]
        for source, part in zip(split.parts, read, strict=True)
    ]
    pairs, notices = combine(split, parts, lambda pair: pair.prompt, lambda pair: pair.conversation is not None)
    numbered = [replace(pair, index=index) for index, pair in enumerate(pairs)]
    return Pairs(numbered, [*part_notices(split, [part.notices for part in read]), *notices])


# The column of a row of a mixture that names its dataset.
_SOURCE = "mixture_source"


def _alike(pair: Pair, source: Part) -> Pair:
    """A pair of a mixture: its row has the columns that a row of any other dataset has."""
    columns, plain = pair.row.columns, Columns().named()
    others = {name: value for name, value in columns.items() if name not in source.columns.named().values()}
    used = {plain[role]: columns[name] for role, name in source.columns.named().items() if name in columns}
    if source.columns.dialogue and pair.conversation is not None:
        used = {"prompt": pair.conversation.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return replace(pair, row=Row(pair.row.where, {**others, **used, _SOURCE: source.dataset}))


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


def read_pairs(path: Path, columns: Columns, on_bad_row: str, first: int | None = None) -> Pairs:
    """Read the preference pairs of a file.

    Args:
        path: file, saved dataset or glob.
        columns: column names.
        on_bad_row: `error` or `skip`.
        first: how many pairs to read from the start; all where None.

    Raises:
        DataError: a row is invalid and `on_bad_row` is `error`; a column is missing in all rows; there are no rows.
    """
    reading = _Reading(path, columns)
    for row in read_rows(path, reading.notices):
        reading.take(row)
        if len(reading.pairs) == first:
            break
    reading.check()
    pairs = reading.pairs
    notices = [*reading.notices, *handle_bad_rows(reading.bad, reading.total, on_bad_row)]
    used = [*columns.named().values(), *(_CHAT_COLUMNS if reading.chat else ())]
    layout = layout_notices(path.name, [pair.row.columns for pair in pairs], columns, reading.chat)
    unused = unused_context(path.name, [pair.row for pair in pairs], used)
    return Pairs(pairs, [*notices, *layout, *unused, *_contradictions(path, pairs)])


class _Reading:
    """The rows of a file so far."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path, self.columns = path, columns
        self.pairs: list[Pair] = []
        self.bad: list[BadRow] = []
        self.notices: list[str] = []
        # Rows as they are before the first pair, and as pairs.
        self.sample: list[Values] = []
        self.objects: list[Row] = []
        self.total = self.ties = 0
        self.chat = columns.dialogue

    def take(self, raw: Row | BadRow) -> None:
        """Add a row."""
        self.total += 1
        if isinstance(raw, Row) and not self.pairs and len(self.sample) < SAMPLE:
            self.sample.append(raw.columns)
        row = raw if isinstance(raw, BadRow) else _as_pair(raw, self.columns)
        if row is None:
            self.ties += 1
            return
        if isinstance(row, Row):
            # The first row decides what the file holds.
            names = list(self.columns.named().values())
            self.chat = self.chat or (not self.objects and is_conversational(row.columns, names))
            self.objects.append(row)
        pair = row if isinstance(row, BadRow) else _pair(row, self.columns, len(self.pairs), self.chat)
        self.bad.append(pair) if isinstance(pair, BadRow) else self.pairs.append(pair)

    def check(self) -> None:
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
        error = missing_columns(self.path, shown, self.objects, needed) if self.objects else None
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


def _contradictions(path: Path, pairs: Sequence[Pair]) -> list[str]:
    """A message that counts the pairs that also occur with chosen and rejected swapped."""
    seen = Counter((p.prompt, p.chosen, p.rejected) for p in pairs)
    count = sum(n for (prompt, a, b), n in seen.items() if a != b and (prompt, b, a) in seen)
    return [f"{path.name}: {count} rows contradict another row (chosen and rejected swapped)"] if count else []
