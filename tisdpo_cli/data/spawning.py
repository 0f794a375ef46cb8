"""Starts processes that work for this one, so that they run nothing but their work and end with it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

_hiding = threading.Lock()


class Spawning(SpawnContext):
    """Spawns processes that do not import the main module, and knows them.

    Python imports the main module in each spawned process again. A script without a main guard would begin anew there,
    and wait for what this process holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._started: list[SpawnProcess] = []

    def Process(self, *given: Any, **named: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802 - by its name
        """A process of this context."""
        process = _Spawned(*given, **named)
        self._started.append(process)
        return process

    def terminate(self) -> None:
        """End all processes, whatever they are at."""
        for process in self._started:
            if process.pid is not None:
                process.terminate()


class _Spawned(SpawnProcess):
    def start(self) -> None:
        """Start the process."""
        with _without_main(), _without_interrupts():
            super().start()


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide where the main module comes from."""
    main = vars(sys.modules["__main__"])
    hidden = {"__spec__": None, "__file__": None}
    with _hiding:
        known = {name: main[name] for name in hidden if name in main}
        main.update(hidden)
        try:
            yield
        finally:
            for name in hidden:
                del main[name]
            main.update(known)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block Ctrl-C, which a process inherits: it would end with a traceback until it can ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
