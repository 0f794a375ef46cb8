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


class Layout:
    """What should be said of the layout of rows that are read as pairs."""

    def __init__(self, shown: str, columns: Columns) -> None:
        """Begin a file.

        Args:
            shown: its name.
            columns: how it is read.
        """
        self._shown, self._columns = shown, columns
        self._sample: list[Values] = []
        self._rows = self._unclear = 0
        # A scored dataset is past this choice.
        self._scored = columns.data_format == "pairs"

    def add(self, row: Values) -> None:
        """Look at a row that is not bad."""
        self._rows += 1
        if len(self._sample) < SAMPLE:
            self._sample.append(row)
            self._scored = self._scored and all(name in row for name in _SCORES)
            self._scored = self._scored and "chosen_weight" not in self._sample[0]
        self._unclear += self._scored and not _is_clear(row)

    def notices(self, chat: bool) -> list[str]:
        """Return messages for the user.

        Args:
            chat: whether the rows hold conversations.
        """
        notices = []
        if self._sample and chat:
            notices.append(f"{self._shown}: {_conversations(self._sample[0], self._columns)}")
        elif self._sample and all(_repeats_prompt(row, self._columns) for row in self._sample):
            notices.append(
                f"{self._shown}: the answers repeat the prompt, which is thus read twice; remove it from them"
            )
        if self._scored and self._unclear:
            counted = f"{self._unclear} of {self._rows} rows do not prefer the chosen answer by its score"
            notices.append(
                f"{self._shown}: {counted}; --data-format scored-pairs drops ties and refuses contradictions"
            )
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
