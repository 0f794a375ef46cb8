"""How wide a view is: as wide as the terminal that it goes to, and elsewhere the same on every machine."""

from __future__ import annotations

import os

from rich.console import Console, RenderableType
from rich.measure import Measurement

# Columns without a terminal, unless COLUMNS says another number.
_PLAIN = 80
# Wider than any content: asks how wide that is.
_UNLIMITED = 100_000


def steady(console: Console) -> Console:
    """The console; one that writes to no terminal does not follow the one that another stream is on."""
    if not _is_terminal(console) and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _PLAIN
    return console


def print_whole(console: Console, view: RenderableType) -> None:
    """Print a view whose lines have a width of their own, such as a table: without a terminal no line is broken."""
    width = console.width
    if not _is_terminal(console):
        options = console.options.update(max_width=_UNLIMITED)
        console.width = Measurement.get(console, options, view).maximum
    try:
        console.print(view)
    finally:
        console.width = width


def _is_terminal(console: Console) -> bool:
    # Not `is_terminal`, which FORCE_COLOR sets too.
    try:
        return bool(console.file.isatty())
    except ValueError:  # closed
        return False
