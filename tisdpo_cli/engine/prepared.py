"""Work that is done before the processes of a run join, and told after they have.

Reading and tokenizing a large dataset takes longer than the processes of a group wait for one another. It needs none of
them, so it comes first; but what it says, and an error that it meets, keep their place behind the checks of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from tisdpo_cli.errors import TisdpoError
from tisdpo_cli.reporter import Reporter, Silent

T = TypeVar("T")


class Prepared(Generic[T]):
    """Work, done once: early by `start`, or when its result is asked for."""

    def __init__(self, work: Callable[[Reporter], T]) -> None:
        """Prepare some work.

        Args:
            work: gets the reporter to use.
        """
        self._work, self._spoken = work, _Recorder()
        self._outcome: list[T] = []
        self._fault: TisdpoError | None = None
        self._done = False

    def start(self) -> None:
        """Do the work now; what it says and an error of the user's are kept for `result`."""
        if self._done:
            return
        self._done = True
        try:
            self._outcome.append(self._work(self._spoken))
        except TisdpoError as fault:
            self._fault = fault

    def result(self, reporter: Reporter) -> T:
        """Say what the work said, and return its result.

        Raises:
            TisdpoError: the work met it.
        """
        self.start()
        for warning, text in self._spoken.lines:
            (reporter.warn if warning else reporter.note)(text)
        if self._fault is not None:
            raise self._fault
        return self._outcome[0]


class _Recorder(Silent):
    def __init__(self) -> None:
        self.lines: list[tuple[bool, str]] = []

    def note(self, text: str) -> None:
        """Keep a message."""
        self.lines.append((False, text))

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.lines.append((True, text))
