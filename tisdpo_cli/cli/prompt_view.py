"""Terminal view of a prompt: a text as it is; a conversation as its last turn, with a line for each earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from tisdpo_cli.text import visible

if TYPE_CHECKING:
    from tisdpo_cli.engine.inspection.results import PairView, Turn

# Earlier turns that get a line each; of more, the first and the latest do.
_EARLIER = 6
# Lines of the last turn.
_LINES = 20


def prompt_view(pair: PairView, width: int) -> Text:
    """The prompt of a pair.

    Args:
        pair: with the prompt.
        width: in columns.
    """
    if not pair.turns:
        return Text(visible(pair.prompt.strip(), keep_lines=True), style="dim")
    *earlier, last = pair.turns
    view = Text()
    for line in _earlier_lines(earlier):
        line.truncate(width, overflow="ellipsis")
        view.append_text(line).append("\n")
    return view.append(f"{last.role}: ", style="bold").append(_bounded(last.text, width))


def _earlier_lines(turns: Sequence[Turn]) -> list[Text]:
    lines = [Text(f"{turn.role}: {visible(' '.join(turn.text.split()))}", style="dim") for turn in turns]
    if len(lines) <= _EARLIER:
        return lines
    latest = _EARLIER - 2
    count = len(lines) - 1 - latest
    return [lines[0], Text(f"… {count} turns", style="dim"), *lines[-latest:]]


def _bounded(text: str, width: int) -> str:
    """A text in at most about `_LINES` lines."""
    lines = visible(text.strip(), keep_lines=True).split("\n")
    shown = "\n".join(lines[:_LINES])[: _LINES * width]
    left = len("\n".join(lines)) - len(shown)
    return f"{shown}\n… ({left} more characters)" if left else shown
