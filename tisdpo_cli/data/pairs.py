"""Turns rows into preference pairs: finds the columns, checks types and emptiness. Knows no tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tisdpo_cli.data.dialogues import dialogue_conversation
from tisdpo_cli.data.hints import missing_columns, other_shape, unused_context
from tisdpo_cli.data.messages import Conversation, is_conversational, preference_conversation
from tisdpo_cli.data.reader import read_rows, shown_path
from tisdpo_cli.data.rows import BadRow, Row, emptiness, handle_bad_rows
from tisdpo_cli.errors import DataError


@dataclass(frozen=True)
class Columns:
    """Column names of a preference dataset.

    Attributes:
        dialogue: whether the texts are dialogues with turns of "Human:" and "Assistant:", to be read as messages.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    dialogue: bool = False

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


def read_pairs(path: Path, columns: Columns, on_bad_row: str) -> Pairs:
    """Read the preference pairs of a split.

    Args:
        path: file of the split.
        columns: column names.
        on_bad_row: `error` or `skip`.

    Raises:
        DataError: a row is invalid and `on_bad_row` is `error`; a column is missing in all rows; there are no rows.
    """
    objects: list[Row] = []
    pairs: list[Pair] = []
    bad: list[BadRow] = []
    notices: list[str] = []
    total, chat = 0, columns.dialogue
    for row in read_rows(path, notices):
        total += 1
        if isinstance(row, Row):
            # The first row decides what the file holds.
            chat = chat or (not objects and is_conversational(row.columns, list(columns.named().values())))
            objects.append(row)
        pair = row if isinstance(row, BadRow) else _pair(row, columns, len(pairs), chat)
        bad.append(pair) if isinstance(pair, BadRow) else pairs.append(pair)
    if not total:
        raise DataError("the file has no rows", where=shown_path(path))
    needed = {role: name for role, name in columns.named().items() if role != "prompt" or not chat}
    error = missing_columns(path, shown_path(path), objects, needed) if objects else None
    if error is None and len(bad) == total:
        error = other_shape(path, shown_path(path))
    if error is not None:
        raise error
    notices += handle_bad_rows(bad, total, on_bad_row)
    used = [*columns.named().values(), *(_CHAT_COLUMNS if chat else ())]
    unused = unused_context(path.name, [pair.row for pair in pairs], used)
    return Pairs(pairs, [*notices, *unused, *_contradictions(path, pairs)])


# Columns that conversations use besides those of the pair.
_CHAT_COLUMNS = ("system", "tools", "conversations", "chat_template_kwargs")


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
