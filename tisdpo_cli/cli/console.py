"""What a command reports on stderr while it works: notes, warnings, and progress as a live bar or as plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tisdpo_cli.cli.sparkline import Sparkline
from tisdpo_cli.cli.widths import print_whole, steady
from tisdpo_cli.errors import UserError
from tisdpo_cli.text import visible

# Without a terminal: one line at the start, one at the end, and one every so often between.
_PLAIN_EVERY_SECONDS = 5.0

_ERROR_LENGTH = 300

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
    return steady(Console(stderr=True, highlight=False, markup=False, emoji=False))


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
        print_whole(self.console, view) if isinstance(view, Table) else self.console.print(view)

    def command(self, label: str, command: str) -> None:
        """A command line to paste: never broken, whatever the width."""
        self.console.print(Text(f"{label}: {visible(command)}", style="dim"), soft_wrap=True)

    def progress(self, title: str, total: int, done: int, unit: str) -> LiveProgress | PlainProgress:
        """A live bar on a terminal, plain lines elsewhere."""
        if self.console.is_terminal:
            return LiveProgress(self.console, title, total, done, unit)
        return PlainProgress(self.console, title, total, done, unit)

    def _line(self, text: Text) -> None:
        # Lines are broken at words on a terminal, and not at all in a pipe.
        self.console.print(text, soft_wrap=not self.console.is_terminal)


def figure_texts(figures: Mapping[str, float]) -> list[str]:
    """`loss 0.6931`, `margin +0.0000`, … for the metrics that are given, the most important first."""
    return [f"{label} {form.format(figures[key])}" for key, label, form in _FIGURES if key in figures]


def _plain_line(title: str, done: int, total: int, unit: str, figures: Mapping[str, float]) -> str:
    return "  ".join([f"{title} {done}/{total} {unit}", *figure_texts(figures)])


class _Figures(TextColumn):
    """The newest figures, as many as fit on the line: what does not fit is left out, not broken or cut."""

    def __init__(self, console: Console, used: int) -> None:
        super().__init__("")
        self._console, self._used = console, used

    def render(self, task: Task) -> Text:
        """The figures of a task."""
        room = self._console.width - self._used - len(str(task.description))
        text = ""
        for figure in task.fields["figures"]:
            if len(text) + 2 + len(figure) > room:
                break
            text += f"{'  ' if text else ''}{figure}"
        return Text(text, no_wrap=True)


class _Bar(Progress):
    """The bar, and beneath it the course of a few figures, as many as fit on the line."""

    def __init__(self, courses: Mapping[str, Sparkline], *columns: ProgressColumn, **more: Any) -> None:
        self._courses = courses
        super().__init__(*columns, **more)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and the curves."""
        yield from super().get_renderables()
        line = ""
        for label, course in self._courses.items():
            part = f"{label} {course}"
            if len(str(course)) > 1 and len(line) + 2 + len(part) < self.console.width:
                line += f"{'  ' if line else ''}{part}"
        if line:
            yield Text(line, style="dim", no_wrap=True)


class LiveProgress:
    """A bar with its title, count, time left, newest figures and curves; when done, one plain line takes its place."""

    _BAR = 12
    _CURVE = 24
    _CURVES = ("loss", "rewards/margins")

    def __init__(self, console: Console, title: str, total: int, done: int, unit: str) -> None:
        self._console, self._title, self._unit = console, title, unit
        count = f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"
        # Title, bar, count and time stay; separators and the widest count are part of what they take.
        used = self._BAR + 2 * len(str(total)) + 2 + len(unit) + len("0:00:00") + 6
        self._courses = {label: Sparkline(self._CURVE) for key, label, _ in _FIGURES if key in self._CURVES}
        self._bar = _Bar(
            # Not every encoding has the characters.
            {} if console.options.ascii_only else self._courses,
            TextColumn("{task.description}"),
            BarColumn(bar_width=self._BAR),
            TextColumn(count),
            TimeRemainingColumn(compact=True),
            _Figures(console, used),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, figures=[])
        self._figures: dict[str, float] = {}

    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        """Move the bar and update figures and curves; figures of an evaluation stay until the next one."""
        self._figures.update(figures)
        for key, label, _ in _FIGURES:
            if key in self._CURVES and key in figures:
                self._courses[label].add(figures[key])
        self._bar.update(self._task, advance=units, figures=figure_texts(self._figures))

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        task = self._bar.tasks[0]
        line = _plain_line(self._title, int(task.completed), int(task.total or 0), self._unit, self._figures)
        self._console.print(Text(line), soft_wrap=True)


class PlainProgress:
    """One line every few seconds."""

    def __init__(self, console: Console, title: str, total: int, done: int, unit: str) -> None:
        self._console, self._title, self._total, self._done, self._unit = console, title, total, done, unit
        self._started, self._at_start, self._last = time.monotonic(), done, 0.0

    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        """Count, and print a line when the last one is old enough; what an earlier run did is no news."""
        if not units and self._done:
            return
        self._done += units
        now = time.monotonic()
        if self._done < self._total and now - self._last < _PLAIN_EVERY_SECONDS:
            return
        self._last = now
        line = _plain_line(self._title, self._done, self._total, self._unit, figures)
        self._console.print(Text(f"{line}{self._left(now)}"), soft_wrap=True)

    def _left(self, now: float) -> str:
        advanced = self._done - self._at_start
        if not advanced or self._done >= self._total:
            return ""
        seconds = (now - self._started) / advanced * (self._total - self._done)
        return f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def print_error(fault: UserError) -> None:
    """Print the last line on stderr, at most 300 characters: the description is cut, not the place or the fix."""
    where, what, fix = (" ".join(visible(part).split()) for part in (fault.where, fault.what, fault.fix))
    where, fix = (f"{where}: " if where else ""), (f"; {fix}" if fix else "")
    room = _ERROR_LENGTH - len("error: ") - len(where) - len(fix)
    if len(what) > room:
        what = what[: max(20, room - 1)] + "…"
    print(f"error: {where}{what}{fix}"[:_ERROR_LENGTH], file=sys.stderr, flush=True)
