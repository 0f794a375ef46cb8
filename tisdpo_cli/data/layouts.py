"""Recognizes well-known layouts of rows, to say how they are read or which option reads them. Converts nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tisdpo_cli.data.data_formats import check_scores, recognize
from tisdpo_cli.data.dataset import Columns
from tisdpo_cli.errors import DataError

Values = Mapping[str, Any]

# Rows that are looked at.
SAMPLE = 20
# A dialogue in one text, as in hh-rlhf.
_DIALOGUE = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_SCORES = ("score_chosen", "score_rejected")


def suggested_option(rows: Sequence[Values], columns: Columns) -> str | None:
    """Return the option that reads rows which are no pairs as they are, or None if their layout is unknown.

    Args:
        rows: columns of rows.
        columns: how they were read.
    """
    sample = rows[:SAMPLE]
    if not sample:
        return None
    answers = [row.get(name) for row in sample for name in (columns.chosen, columns.rejected)]
    if not columns.dialogue and all(isinstance(text, str) and _DIALOGUE.match(text) for text in answers):
        return "--dialogue hh"
    name = recognize(sample)
    return f"--data-format {name}" if name is not None and name != columns.data_format else None


def layout_notices(shown: str, rows: Sequence[Values], columns: Columns, chat: bool) -> list[str]:
    """Return what should be said of the layout of rows that were read as pairs.

    Args:
        shown: name of the file.
        rows: columns of its rows, without its bad rows.
        columns: how they were read.
        chat: whether they hold conversations.
    """
    if not rows:
        return []
    sample, notices = rows[:SAMPLE], []
    if chat:
        notices.append(f"{shown}: {_conversations(rows[0], columns)}")
    elif all(_repeats_prompt(row, columns) for row in sample):
        notices.append(f"{shown}: the answers repeat the prompt, which is thus read twice; remove it from them")
    # A scored dataset is past this choice.
    scored = all(name in row for row in sample for name in _SCORES) and "chosen_weight" not in rows[0]
    unclear = sum(not _is_clear(row) for row in rows) if columns.data_format == "pairs" and scored else 0
    if unclear:
        counted = f"{unclear} of {len(rows)} rows do not prefer the chosen answer by its score"
        notices.append(f"{shown}: {counted}; --data-format scored-pairs drops ties and refuses contradictions")
    return notices


def _conversations(row: Values, columns: Columns) -> str:
    if columns.dialogue:
        return "dialogues in one text (hh-rlhf), read as messages"
    prompt = row.get(columns.prompt)
    if isinstance(prompt, str):
        return "prompt text beside whole conversations (UltraFeedback binarized), read as messages"
    if prompt is not None:
        return "conversations with an explicit prompt"
    if row.get("conversations") is not None:
        return "conversations with their prompt in 'conversations' (ShareGPT)"
    return "conversations with an implicit prompt: the messages that both answers share"


def _repeats_prompt(row: Values, columns: Columns) -> bool:
    prompt = row[columns.prompt]
    return isinstance(prompt, str) and all(row[name].startswith(prompt) for name in (columns.chosen, columns.rejected))


def _is_clear(row: Values) -> bool:
    try:
        return check_scores(row)
    except DataError:
        return False
