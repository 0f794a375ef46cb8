"""Turns preference pairs or instruction rows into examples for supervised fine-tuning. Knows no tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tisdpo_cli.data.hints import unused_context
from tisdpo_cli.data.pairs import Columns, read_pairs, text_problem
from tisdpo_cli.data.reader import read_rows
from tisdpo_cli.data.rows import BadRow, Row, handle_bad_rows
from tisdpo_cli.errors import UsageError

Target = Literal["chosen", "rejected", "both"]


@dataclass(frozen=True)
class Example:
    """A prompt and the response to learn."""

    where: str
    prompt: str
    response: str


def read_examples(
    path: Path, columns: Columns, target: Target, instruction_template: str, on_bad_row: str
) -> tuple[list[Example], list[str]]:
    """Read the examples of a split, and messages for the user.

    A file whose first valid row has an `instruction` but no chosen column holds instruction rows, any other one pairs.

    Args:
        path: file of the split.
        columns: column names of pairs.
        target: which responses of a pair become examples.
        instruction_template: prompt of an instruction row, with a placeholder `{instruction}`.
        on_bad_row: `error` or `skip`.

    Raises:
        DataError: rows are invalid.
        UsageError: the target is the rejected response of instruction rows.
    """
    if not _holds_instructions(path, columns):
        split = read_pairs(path, columns, on_bad_row)
        sides = ("chosen", "rejected") if target == "both" else (target,)
        examples = [Example(p.row.where, p.prompt, getattr(p, side)) for p in split.pairs for side in sides]
        return examples, split.notices
    if target == "rejected":
        raise UsageError("instruction rows have no rejected response", where=f"{path}: --target rejected")
    examples, bad = [], []
    notices: list[str] = []
    rows: list[Row] = []
    for row in read_rows(path, notices):
        rows += [row] if isinstance(row, Row) else []
        example = row if isinstance(row, BadRow) else _instruction(row, instruction_template)
        bad.append(example) if isinstance(example, BadRow) else examples.append(example)
    notices += handle_bad_rows(bad, len(examples) + len(bad), on_bad_row)
    return examples, [*notices, *unused_context(path.name, rows, _INSTRUCTION_COLUMNS)]


# Of a row in Alpaca's format.
_INSTRUCTION_COLUMNS = ("instruction", "input", "output")


def _holds_instructions(path: Path, columns: Columns) -> bool:
    first = next((row for row in read_rows(path) if isinstance(row, Row)), None)
    return first is not None and "instruction" in first.columns and columns.chosen not in first.columns


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
