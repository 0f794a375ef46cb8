"""Prepares the next batch in a thread while this one is computed: no GPU waits for rows and padding."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """The batches of steps, each prepared once the one before it is asked for."""

    def __init__(self, prepare: Callable[[int], T], end: int) -> None:
        """Prepare batches ahead.

        Args:
            prepare: makes the batch of a step, in another thread.
            end: the first step without a batch.
        """
        self._prepare, self._end = prepare, end
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """The batch of a step; errors of its preparation are raised here."""
        prepared, ahead = self._next or (None, None)
        batch = ahead.result() if ahead is not None and prepared == step else self._prepare(step)
        following = step + 1
        self._next = (following, self._thread.submit(self._prepare, following)) if following < self._end else None
        return batch

    def close(self) -> None:
        """Prepare no more."""
        self._thread.shutdown(cancel_futures=True)
