"""Sums of many float32 numbers by group, as exact as `math.fsum`, whatever their order."""

from __future__ import annotations

import numpy as np

# Bits of a float32, and how many neighbouring exponents share an array: 31 bits of 63 leave room for 2^32 numbers.
_BITS, _EXPONENTS = 24, 8


class ExactSums:
    """A sum for each of some groups."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        # Exponent to the sums of the integers that the numbers are in units of 2^exponent.
        self._sums: dict[int, np.ndarray] = {}

    def add(self, groups: np.ndarray, values: np.ndarray) -> None:
        """Add numbers.

        Args:
            groups: [n] int, the group of each.
            values: [n] float32, finite.
        """
        mantissas, exponents = np.frexp(values)
        integers = np.ldexp(mantissas.astype(np.float64), _BITS).astype(np.int64)
        units = exponents.astype(np.int64) - _BITS
        shared = units // _EXPONENTS * _EXPONENTS
        integers <<= units - shared
        for unit in np.unique(shared).tolist():
            sums = self._sums.setdefault(unit, np.zeros(self._groups, np.int64))
            here = shared == unit
            np.add.at(sums, groups[here], integers[here])

    def sum(self, *groups: int) -> float:
        """The sum over some groups, rounded once."""
        lowest = min(self._sums, default=0)
        total = sum(int(sums[group]) << (unit - lowest) for unit, sums in self._sums.items() for group in groups)
        return float(total << lowest) if lowest >= 0 else total / (1 << -lowest)
