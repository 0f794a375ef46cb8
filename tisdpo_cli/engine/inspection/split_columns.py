"""The scores and weights of all tokens of a split as columns on disk: the input of every summary.

They are filled in one pass over the pairs. Tokens are those with a score, in the order of the responses: chosen, then
rejected of each pair. The EOS is left out where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tisdpo_cli.engine.inspection.disk_arrays import Column
from tisdpo_cli.engine.inspection.weighted_pairs import InspectedPair, WeightedResponse

CURVE_BINS = 24
# Responses whose tokens are worked on at once.
_RESPONSES = 4096


class Curve:
    """Mean of a value by relative position in the response."""

    def __init__(self) -> None:
        self._sums, self._counts = torch.zeros(CURVE_BINS), torch.zeros(CURVE_BINS)

    def add(self, values: Tensor) -> None:
        """Add the values [n] of a response."""
        bins = (torch.arange(len(values)) * CURVE_BINS // max(1, len(values))).long()
        self._sums.index_add_(0, bins, values)
        self._counts.index_add_(0, bins, torch.ones_like(values))

    def means(self) -> list[float]:
        """One mean per bin."""
        return (self._sums / self._counts.clamp(min=1)).tolist()


class SideColumns:
    """The chosen or the rejected responses.

    Attributes:
        known: r of the tokens.
        scored: r of the tokens and of each EOS with a weight.
        adjusted: r after the steps.
        weights: of the tokens and of each EOS with a weight.
        totals: Σ r of each response.
        sizes: effective sample size of each response.
        tokens: number of tokens, those without a score too.
        clipped: number of tokens that the transform clamps.
        curves: value (`scores`, `adjusted`, `weights`) to its curve.
    """

    def __init__(self) -> None:
        self.known, self.scored, self.adjusted, self.weights = (Column(np.float32) for _ in range(4))
        self.totals, self.sizes = Column(np.float64), Column(np.float64)
        self.tokens = self.clipped = 0
        self.curves = {show: Curve() for show in ("weights", "scores", "adjusted")}

    def add(self, response: WeightedResponse) -> None:
        """Add a response."""
        self.known.append(response.known)
        self.scored.append(response.scored)
        self.adjusted.append(response.adjusted)
        self.weights.append(response.weights)
        self.totals.append([response.total])
        self.sizes.append([response.effective_size])
        self.tokens += len(response.ids)
        self.clipped += int(response.clipped.sum())
        for show, curve in self.curves.items():
            curve.add(response.values(show))


class Tokens(NamedTuple):
    """The tokens of some consecutive responses.

    Attributes:
        begin: number of the first token among all tokens.
        ids: [n] int.
        sides: [n] int, 0 for chosen and 1 for rejected.
        adjusted: [n] float32, r after the steps.
        weights: [n] float32.
    """

    begin: int
    ids: np.ndarray
    sides: np.ndarray
    adjusted: np.ndarray
    weights: np.ndarray


class SplitColumns:
    """Both sides, and what goes over both.

    Attributes:
        ids: of the tokens.
        adjusted: r after the steps.
        weights: of the tokens.
        previews: name of another recipe to the weights under it.
        ends: number of tokens up to the end of each response.
        indices: index of each pair.
        keys: what each pair is sorted by.
        thirds: r after the steps in the first and in the last third of the responses.
    """

    def __init__(self, previews: Iterable[str], key: Callable[[InspectedPair], float]) -> None:
        self.sides = (SideColumns(), SideColumns())
        self.ids, self.ends, self.indices = Column(np.int32), Column(np.int64), Column(np.int64)
        self.adjusted, self.weights, self.keys = Column(np.float32), Column(np.float32), Column(np.float64)
        self.previews = {name: Column(np.float32) for name in previews}
        self.thirds = (Column(np.float32), Column(np.float32))
        self._key = key

    def add(self, pair: InspectedPair, previews: Mapping[str, InspectedPair]) -> None:
        """Add a pair, and the same under every other recipe."""
        self.indices.append([pair.pair.index])
        self.keys.append([self._key(pair)])
        for side, response in zip(self.sides, pair.sides, strict=True):
            side.add(response)
            self.ids.append(response.known_ids)
            self.adjusted.append(response.adjusted)
            self.weights.append(response.values("weights"))
            self.ends.append([len(self.ids)])
            size = len(response.adjusted) // 3
            if size:
                self.thirds[0].append(response.adjusted[:size])
                self.thirds[1].append(response.adjusted[-size:])
        for name, other in previews.items():
            for response in other.sides:
                self.previews[name].append(response.values("weights"))

    def blocks(self) -> Iterator[Tokens]:
        """All tokens, in parts of bounded size for responses of bounded size."""
        ids, adjusted, weights, ends = (c.array() for c in (self.ids, self.adjusted, self.weights, self.ends))
        begin = 0
        # An even number, so that a block begins with a chosen response.
        for first in range(0, len(ends), _RESPONSES):
            block = ends[first : first + _RESPONSES]
            end = int(block[-1])
            sides = np.repeat(np.arange(len(block)) % 2, np.diff(block, prepend=begin))
            yield Tokens(begin, ids[begin:end], sides, adjusted[begin:end], weights[begin:end])
            begin = end
