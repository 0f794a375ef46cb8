"""Turns preference pairs or instruction rows into examples for supervised fine-tuning. Knows no tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tisdpo_cli.data.dataset import Columns, DatasetSplit, Part
from tisdpo_cli.data.hints import UnusedContext
from tisdpo_cli.data.messages import is_supervised, supervised_conversation
from tisdpo_cli.data.mixture import Rows, combine
from tisdpo_cli.data.pairs import Pair, part_notices, read_pairs, text_problem, transcript
from tisdpo_cli.data.reader import read_rows
from tisdpo_cli.data.row_store import RowStore
from tisdpo_cli.data.rows import BadRow, Row, handle_bad_rows
from tisdpo_cli.data.stored_examples import Example, ExampleFile, StoredExamples, keep_examples
from tisdpo_cli.errors import DataError, UsageError

Target = Literal["chosen", "rejected", "both"]


def read_examples(
    split: DatasetSplit, target: Target, instruction_template: str, on_bad_row: str, store: RowStore | None = None
) -> tuple[StoredExamples, list[str]]:
    """Read the examples of a split, and messages for the user.

    The first valid row decides: without a chosen column, `messages` or `conversations` (or messages in `prompt` and
    `completion`) are conversations to learn, and `instruction` makes instruction rows; any other file holds pairs.

    Args:
        split: what is read.
        target: which responses of a pair become examples.
        instruction_template: prompt of an instruction row, with a placeholder `{instruction}`.
        on_bad_row: `error` or `skip`.
        store: where they are kept, or None for the user's cache directory.

    Raises:
        DataError: rows are invalid.
        UsageError: the target is the rejected response of instruction rows.
    """
    store = store or RowStore()
    read = [_read_part(split, part, target, instruction_template, on_bad_row, store) for part in split.parts]
    files = [file for file, _ in read]
    counts = [Rows(len(file), file.chat) for file in files]
    rows, notices = combine(split, counts, lambda: (prompt for file in files for prompt in file.prompts()))
    return StoredExamples(files, rows), [*part_notices(split, [said for _, said in read]), *notices]


Kind = Literal["pairs", "instruction", "messages"]
_USED = {
    # Of a row in Alpaca's format.
    "instruction": ("instruction", "input", "output"),
    "messages": ("messages", "conversations", "prompt", "completion", "system", "tools", "chat_template_kwargs"),
}


def _read_part(
    split: DatasetSplit, part: Part, target: Target, instruction_template: str, on_bad_row: str, store: RowStore
) -> tuple[ExampleFile, list[str]]:
    """The examples of a part, and messages for the user."""
    path, first = part.path, split.first(part)
    kind = _kind(path, part.columns)
    if kind == "pairs":
        read = read_pairs(path, part.columns, on_bad_row, first, store)
        sides = ("chosen", "rejected") if target == "both" else (target,)
        every = partial(_of_pairs, read.pairs, sides)
        return keep_examples(every, len(sides), store), read.notices
    if target == "rejected":
        raise UsageError(f"{kind} rows have no rejected response", where=f"{path}: --target rejected")
    said: list[str] = []

    def examples() -> Iterator[Example]:
        said.clear()
        bad: list[BadRow] = []
        unused, count = UnusedContext(), 0
        for row in read_rows(path, said):
            if isinstance(row, Row):
                unused.add(row.columns)
            example = row if isinstance(row, BadRow) else _example(row, kind, instruction_template)
            if isinstance(example, BadRow):
                bad.append(example)
                continue
            yield example
            count += 1
            if count == first:
                break
        said.extend([*handle_bad_rows(bad, count + len(bad), on_bad_row), *unused.notices(path.name, _USED[kind])])

    return keep_examples(examples, 1, store), said


def _kind(path: Path, columns: Columns) -> Kind:
    """What a file holds, by its first row."""
    if columns.data_format != "pairs":
        return "pairs"
    first = next((row for row in read_rows(path) if isinstance(row, Row)), None)
    if first is None or columns.chosen in first.columns:
        return "pairs"
    if is_supervised(first.columns):
        return "messages"
    return "instruction" if "instruction" in first.columns else "pairs"


def _of_pairs(pairs: Iterable[Pair], sides: Sequence[str]) -> Iterator[Example]:
    return (_of_pair(pair, side) for pair in pairs for side in sides)


def _of_pair(pair: Pair, side: str) -> Example:
    conversation = pair.conversation
    if conversation is not None:
        conversation = replace(conversation, answers=(conversation.answers[side == "rejected"],))
    return Example(pair.row.where, pair.prompt, getattr(pair, side), conversation)


def _example(row: Row, kind: Kind, template: str) -> Example | BadRow:
    if kind == "instruction":
        return _instruction(row, template)
    try:
        conversation = supervised_conversation(row.columns)
    except DataError as error:
        return BadRow(row.where, error.what)
    return Example(row.where, transcript(conversation), str(conversation.answers[0]["content"]), conversation)


def _instruction(row: Row, template: str) -> Example | BadRow:
    """Turn a row in Alpaca's format into an example: `instruction`, optional `input`, `output`."""
    fields: Mapping[str, Any] = row.columns
    for name in ("instruction", "output"):
        if name not in fields:
            return BadRow(row.where, f"column {name!r} is missing")
        problem = text_problem(fields[name])
        if problem:
            return BadRow(row.where, f"{name!r} {problem}")
    extra = fields.get("input")
    if extra is not None and not isinstance(extra, str):
        return BadRow(row.where, "'input' must be a string")
    instruction = fields["instruction"] + (f"\n{extra}" if extra else "")
    response = fields["output"] if fields["output"][:1].isspace() else f" {fields['output']}"
    return Example(row.where, template.replace("{instruction}", instruction), response)
