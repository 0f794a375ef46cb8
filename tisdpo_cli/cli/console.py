"""What people see while a command works, on stderr: notes, warnings, a live view, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from tisdpo_cli.errors import UserError
from tisdpo_cli.text import visible

# Without a terminal: one line at the start, one at the end, and one every so often between.
_PLAIN_EVERY_SECONDS = 5.0

_ERROR_LENGTH = 300
_WIDE = 120

_FIGURES = (
    ("loss", "loss", "{:.4f}"),
    ("eval/loss", "eval", "{:.4f}"),
    ("rewards/margins", "margin", "{:+.4f}"),
    ("rewards/accuracies", "acc", "{:.2f}"),
    ("pairs_per_second", "pairs/s", "{:.1f}"),
    ("tokens_per_second", "tok/s", "{:.0f}"),
)


def stderr_console() -> Console:
    """A console on stderr; honours NO_COLOR and FORCE_COLOR."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


class TerminalReporter:
    """Tells people what the engine does."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or stderr_console()

    def note(self, text: str) -> None:
        """A plain fact."""
        self._line(Text(visible(text), style="dim"))

    def warn(self, text: str) -> None:
        """Something to look at."""
        self._line(Text("warning: ", style="bold yellow").append(visible(text), style="default not bold"))

    def stage(self, title: str) -> None:
        """A stage of the pipeline begins."""
        self._line(Text(f"\n{visible(title)}", style="bold cyan"))

    def show(self, view: Any) -> None:
        """A view for people."""
        self.console.print(view)

    def progress(self, title: str, total: int, done: int, unit: str) -> LiveProgress | PlainProgress:
        """A live bar on a terminal, plain lines elsewhere."""
        if self.console.is_terminal:
            return LiveProgress(self.console, title, total, done)
        return PlainProgress(self.console, total, done, unit)

    def _line(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)


def figures_text(figures: Mapping[str, float], labels: Collection[str] | None = None) -> str:
    """`loss 0.6931  margin +0.0000 …` of the metrics that are there, or of some of them."""
    shown = [(label, form.format(figures[key])) for key, label, form in _FIGURES if key in figures]
    return "  ".join(f"{label} {value}" for label, value in shown if labels is None or label in labels)


class LiveProgress:
    """A bar with the newest figures."""

    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        # The count and the time left must stay readable on 80 columns: the bar and the rates give way.
        wide = console.width >= _WIDE
        self._labels = None if wide else ("loss", "margin", "acc")
        columns = (
            SpinnerColumn(),
            BarColumn(bar_width=24 if wide else 8),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
        )
        self._bar = Bar(*columns, console=console, transient=False)
        self._task = self._bar.add_task(title, total=total, completed=done, figures="")
        self._figures: dict[str, float] = {}

    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        """Move the bar and renew the figures; an evaluation stays until the next one."""
        self._figures.update(figures)
        self._bar.update(self._task, advance=units, figures=figures_text(self._figures, self._labels))

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class PlainProgress:
    """One line every few seconds."""

    def __init__(self, console: Console, total: int, done: int, unit: str) -> None:
        self._console, self._total, self._done, self._unit = console, total, done, unit
        self._began, self._at_start, self._last = time.monotonic(), done, 0.0

    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        """Count, and now and then say."""
        self._done += units
        now = time.monotonic()
        if self._done < self._total and now - self._last < _PLAIN_EVERY_SECONDS:
            return
        self._last = now
        line = f"{self._unit} {self._done}/{self._total}  {figures_text(figures)}{self._left(now)}"
        self._console.print(Text(line), soft_wrap=True)

    def _left(self, now: float) -> str:
        made = self._done - self._at_start
        if not made or self._done >= self._total:
            return ""
        seconds = (now - self._began) / made * (self._total - self._done)
        return f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def print_error(fault: UserError) -> None:
    """The last line on stderr, in at most 300 characters: what gives way is the what, not where it is or the fix."""
    where, what, fix = (" ".join(visible(part).split()) for part in (fault.where, fault.what, fault.fix))
    where, fix = (f"{where}: " if where else ""), (f"; {fix}" if fix else "")
    room = _ERROR_LENGTH - len("error: ") - len(where) - len(fix)
    if len(what) > room:
        what = what[: max(20, room - 1)] + "…"
    print(f"error: {where}{what}{fix}"[:_ERROR_LENGTH], file=sys.stderr, flush=True)
