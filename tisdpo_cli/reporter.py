"""How the engine speaks: a protocol that the CLI implements, and a silent one for other ranks and for tests."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol


class Progress(Protocol):
    """A running stage: a count of done units and the newest figures."""

    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        """Say that `units` more are done and what the figures are now."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Reporter(Protocol):
    """Where a stage tells what it does."""

    def note(self, text: str) -> None:
        """A plain fact."""

    def warn(self, text: str) -> None:
        """Something the user should look at."""

    def command(self, label: str, command: str) -> None:
        """Show a command line to paste."""

    def progress(self, title: str, total: int, done: int, unit: str) -> Progress:
        """Start a progress display of `total` units, `done` of them before now."""

    def stage(self, title: str) -> None:
        """A stage of the pipeline begins."""

    def show(self, view: Any) -> None:
        """A view that the stage has made, for people."""


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def command(self, label: str, command: str) -> None:
        """Nothing."""

    def stage(self, title: str) -> None:
        """Nothing."""

    def show(self, view: Any) -> None:
        """Nothing."""

    def progress(self, title: str, total: int, done: int, unit: str) -> Progress:
        """A progress that shows nothing."""
        return _SilentProgress()


class _SilentProgress:
    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        """Nothing."""

    def __enter__(self) -> _SilentProgress:
        return self

    def __exit__(self, *_: object) -> None:
        return None
