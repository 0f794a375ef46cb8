"""Weights of our own for a pair, from the scores of both responses; they go to `train --weights-are final`.

The published weights are exp(r) for a chosen and exp(−r) for a rejected token, so that a token that stands on both
sides is pushed by 2 sinh r whatever the preference says. These here treat both sides alike (the preference alone
says where to push), or weigh a response as a whole. It knows scores only. Legend: n tokens of a response, its EOS
among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Weigh = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
# The clamp of the published weights.
_LOWEST, _HIGHEST = -0.5, 1.5


def size(r: np.ndarray) -> np.ndarray:
    """[n] the size of r as a share of 4 nats, at most 1, times 2: what carries no preference has no say."""
    return 2 * np.minimum(np.abs(r) / 4, 1.0)


def size_of_mean_1(r: np.ndarray) -> np.ndarray:
    """[n] the size of r over its mean in the response."""
    return np.abs(r) / max(float(np.abs(r).mean()), 1e-6)


def _alike(token: Callable[[np.ndarray], np.ndarray]) -> Weigh:
    return lambda chosen, rejected: (token(chosen), token(rejected))


def _by_support(token: Callable[[np.ndarray], np.ndarray], pair: Callable[[float], float]) -> Weigh:
    """A pair has as much say as its scores support it: tanh of half the difference of Σ r, from −1 to 1."""

    def weigh(chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        trust = pair(float(np.tanh((chosen.sum() - rejected.sum()) / 2)))
        return token(chosen) * trust, token(rejected) * trust

    return weigh


def _mean_of_exp(chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The published weights, each replaced by their mean over the response."""
    exp = [np.exp(sign * np.clip(r, _LOWEST, _HIGHEST)) for sign, r in ((1, chosen), (-1, rejected))]
    return np.full_like(chosen, exp[0].mean()), np.full_like(rejected, exp[1].mean())


INVENTIONS: Mapping[str, Weigh] = {
    "size of r": _alike(size),
    "size of r, mean 1": _alike(size_of_mean_1),
    "exp, mean of response": _mean_of_exp,
    # A pair that the scores contradict has less say, or is turned round.
    "doubt": _by_support(np.ones_like, lambda support: (1 + support) / 2),
    "size of r, doubt": _by_support(size, lambda support: (1 + support) / 2),
    "turn": _by_support(np.ones_like, lambda support: support),
}
