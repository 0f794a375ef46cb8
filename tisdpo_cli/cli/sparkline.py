"""A curve in a few characters, of all values so far however many there are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class Sparkline:
    """The course of a value, in equal parts: each character is the mean of as many values that follow one another.

    Attributes:
        width: characters at most, an even number. When they are full, two become one.
    """

    width: int
    _means: list[float] = field(default_factory=list)
    _each: int = 1
    _open: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Add a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        if len(self._open) < self._each:
            return
        self._means.append(math.fsum(self._open) / len(self._open))
        self._open = []
        if len(self._means) >= self.width:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(first + second) / 2 for first, second in pairs]
            self._each *= 2

    def __str__(self) -> str:
        means = [*self._means, *([math.fsum(self._open) / len(self._open)] if self._open else [])]
        low, high = min(means, default=0.0), max(means, default=0.0)
        if high <= low:
            return _BLOCKS[3] * len(means)
        return "".join(_BLOCKS[round((value - low) / (high - low) * (len(_BLOCKS) - 1))] for value in means)
