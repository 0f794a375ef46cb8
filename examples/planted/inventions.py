"""Weights of our own for a pair, from the scores of both responses; they go to `train --weights-are final`.

The published weights are exp(r) for a chosen and exp(−r) for a rejected token, so that a token that stands on both
sides is pushed by 2 sinh r whatever the preference says. These here treat both sides alike (the preference alone
says where to push), doubt pairs that the scores contradict, or both. It knows scores only. Legend: n tokens of a
response, its EOS among them where scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Weigh = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def magnitude(r: np.ndarray, full: float = 1.0) -> np.ndarray:
    """[n] the size of r, as a share of `full` nats, at most 1: what carries no preference has no say."""
    return np.minimum(np.abs(r) / full, 1.0)


def support(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """How much the scores are for the chosen response, from −1 to 1: tanh of half the difference of Σ r."""
    return float(np.tanh((chosen.sum() - rejected.sum()) / 2))


def _ones(r: np.ndarray) -> np.ndarray:
    return np.ones_like(r)


def _both(token: Callable[[np.ndarray], np.ndarray], pair: Callable[[float], float]) -> Weigh:
    def weigh(chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        trust = pair(support(chosen, rejected))
        return token(chosen) * trust, token(rejected) * trust

    return weigh


INVENTIONS: Mapping[str, Weigh] = {
    "size of r": _both(magnitude, lambda _: 1.0),
    "doubt": _both(_ones, lambda s: (1 + s) / 2),
    "size of r, doubt": _both(magnitude, lambda s: (1 + s) / 2),
    "turn": _both(_ones, lambda s: s),
    "size of r, turn": _both(magnitude, lambda s: s),
}
