"""Pairs ready for training: their tokens, their token weights and their log-probs under the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from tisdpo_cli.data.arrow_files import IntArray
from tisdpo_cli.data.tokens import EncodedPair
from tisdpo_cli.engine.training.float_pairs import Both


@dataclass(frozen=True)
class WeightedPair:
    """A pair ready for training.

    Attributes:
        tokens: its prompt and responses.
        weights: token weights of both responses, or None for unit weights.
        reference: log-probs of both responses under the reference, if computed before training.
    """

    tokens: EncodedPair
    weights: Both | None = None
    reference: Both | None = None


class WeightedPairs(Sequence[WeightedPair]):
    """Pairs whose parts are read as they are asked for."""

    def __init__(
        self,
        tokens: Sequence[EncodedPair],
        weights: Sequence[Both] | None = None,
        reference: Sequence[Both] | None = None,
        needed: IntArray | None = None,
        sizes: Mapping[str, Any] | None = None,
    ) -> None:
        """Put pairs together.

        Args:
            tokens: of each pair.
            weights: of each pair, or None for unit weights.
            reference: log-probs of the pairs that are needed, if any are.
            needed: their indices, in order.
            sizes: counts and lengths of the split that they come from; see `TruncationStats.sizes`.
        """
        self.tokens, self.weights, self.sizes = tokens, weights, dict(sizes or {})
        self._reference, self._needed = reference, needed

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> WeightedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[WeightedPair]: ...
    def __getitem__(self, index: int | slice) -> WeightedPair | list[WeightedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return WeightedPair(self.tokens[i], None if self.weights is None else self.weights[i], self._logps(i))

    def with_reference(self, needed: IntArray, reference: Sequence[Both]) -> WeightedPairs:
        """The same pairs, those that are needed with log-probs under the reference."""
        return WeightedPairs(self.tokens, self.weights, reference, needed, self.sizes)

    def _logps(self, i: int) -> Both | None:
        if self._reference is None or self._needed is None:
            return None
        place = int(np.searchsorted(self._needed, i))
        known = place < len(self._needed) and self._needed[place] == i
        return self._reference[place] if known else None


def tokens_of(pairs: Sequence[WeightedPair]) -> Sequence[EncodedPair]:
    """The tokens of each pair."""
    return pairs.tokens if isinstance(pairs, WeightedPairs) else [pair.tokens for pair in pairs]


def are_weighted(pairs: Sequence[WeightedPair]) -> bool:
    """Whether any pair has token weights; of `WeightedPairs` all have, or none."""
    if isinstance(pairs, WeightedPairs):
        return pairs.weights is not None
    return any(pair.weights is not None for pair in pairs)
