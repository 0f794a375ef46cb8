"""Statistics of an evaluation: means with errors, intervals, tests. Numbers in, numbers out; it knows no models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from tisdpo_cli.engine.evaluation.results import Interval, MeanWithError, WinRate

_RESAMPLES = 2000
_GRAM = 4
_LARGEST_EXPONENT = 700.0


def mean(values: Sequence[float]) -> MeanWithError:
    """The mean and its standard error.

    >>> mean([1.0, 3.0])
    MeanWithError(value=2.0, standard_error=1.0)
    """
    return ratio(values, [1] * len(values))


def ratio(sums: Sequence[float], counts: Sequence[int]) -> MeanWithError:
    """Σ sums / Σ counts over responses, a mean per token say; its standard error takes a response as the unit.

    >>> ratio([2.0, 6.0], [2, 2])
    MeanWithError(value=2.0, standard_error=1.0)
    """
    n, total = len(sums), sum(counts)
    if not total:
        return MeanWithError(0.0, None)
    value = math.fsum(sums) / total
    squares = math.fsum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return MeanWithError(value, math.sqrt(squares * n / (n - 1)) / total if n > 1 else None)


def bootstrap(groups: Sequence[Sequence[float]], seed: int) -> Interval:
    """The mean of group means, with the percentile interval of 95 %; groups are drawn anew, not what is in them.

    Args:
        groups: rewards of the responses to each prompt.
        seed: of what is drawn.
    """
    means = torch.tensor([math.fsum(group) / len(group) for group in groups], dtype=torch.float64)
    chance = torch.Generator().manual_seed(seed)
    draws = [means[torch.randint(len(means), means.shape, generator=chance)].mean() for _ in range(_RESAMPLES)]
    low, high = torch.stack(draws).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(means.mean()), low, high)


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> WinRate:
    """Rewards of two policies for the same prompts, one against one.

    >>> win_rate([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    WinRate(wins=2, ties=1, losses=0, win_rate=0.8333333333333334, p_value=0.5)
    """
    wins = sum(a > b for a, b in zip(ours, theirs, strict=True))
    losses = sum(a < b for a, b in zip(ours, theirs, strict=True))
    ties = len(ours) - wins - losses
    return WinRate(wins, ties, losses, (wins + ties / 2) / len(ours), sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
    """How likely a split as uneven as this, or more so, is where both sides are alike: exact, two-sided.

    >>> sign_test(5, 0)
    0.0625
    """
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def repetition(ids: Sequence[int]) -> float:
    """The share of the 4-grams of a response that stood in it before; 0 where it has none.

    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])
    0.2
    """
    grams = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def perplexity(total_logp: float, tokens: int) -> float:
    """exp of the mean negative log-prob of a token, as far as floats reach."""
    return math.exp(min(-total_logp / max(1, tokens), _LARGEST_EXPONENT))


def between(points: Sequence[tuple[float, float]], at: float) -> float | None:
    """The height at a place, on straight lines between points (place, height); None beyond them.

    >>> between([(0.0, 0.0), (2.0, 4.0)], 1.0)
    2.0
    """
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * ((at - x0) / (x1 - x0) if x1 > x0 else 0.0)
    return None
