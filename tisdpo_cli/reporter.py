"""The engine's output: a protocol that the CLI implements, and a silent one for other ranks and tests."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol


class Progress(Protocol):
    """Progress of a running stage: a count of units and the latest metrics."""

    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        """Add finished units, and show the latest metrics; with 0 units, those of an earlier run that is resumed."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Reporter(Protocol):
    """Where a stage reports what it does."""

    def note(self, text: str) -> None:
        """Show a message."""

    def warn(self, text: str) -> None:
        """Show a warning."""

    def command(self, label: str, command: str) -> None:
        """Show a command line to paste."""

    def progress(self, title: str, total: int, done: int, unit: str) -> Progress:
        """Start a progress display of `total` units, of which `done` are finished."""

    def stage(self, title: str) -> None:
        """Announce a stage of the pipeline."""

    def show(self, view: Any) -> None:
        """Show a result of the stage."""


class Silent:
    """A reporter without output."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Do nothing."""

    def command(self, label: str, command: str) -> None:
        """Do nothing."""

    def stage(self, title: str) -> None:
        """Do nothing."""

    def show(self, view: Any) -> None:
        """Do nothing."""

    def progress(self, title: str, total: int, done: int, unit: str) -> Progress:
        """Return a progress display without output."""
        return _SilentProgress()


class _SilentProgress:
    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        """Do nothing."""

    def __enter__(self) -> _SilentProgress:
        return self

    def __exit__(self, *_: object) -> None:
        return None
