"""Statistics of an evaluation: means with errors, intervals, tests. Numbers in, numbers out; it knows no models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from tisdpo_cli.engine.evaluation.results import Interval, MeanWithError, WinRate

_RESAMPLES = 2000
_NGRAM = 4
# Close to the largest argument of exp in float64.
_LARGEST_EXPONENT = 700.0


def mean(values: Sequence[float]) -> MeanWithError:
    """The mean and its standard error.

    >>> mean([1.0, 3.0])
    MeanWithError(value=2.0, standard_error=1.0)
    """
    return ratio(values, [1] * len(values))


def ratio(sums: Sequence[float], counts: Sequence[int]) -> MeanWithError:
    """Σ sums / Σ counts over responses, such as a mean per token, with a standard error over responses.

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
    """The mean of group means with its 95 % percentile interval; groups are resampled, not their members.

    Args:
        groups: rewards of the responses to each prompt.
        seed: of the resampling.
    """
    means = torch.tensor([math.fsum(group) / len(group) for group in groups], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    resampled = [means[torch.randint(len(means), means.shape, generator=generator)].mean() for _ in range(_RESAMPLES)]
    low, high = torch.stack(resampled).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(means.mean()), low, high)


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> WinRate:
    """Compare rewards of two policies prompt by prompt.

    >>> win_rate([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    WinRate(wins=2, ties=1, losses=0, win_rate=0.8333333333333334, p_value=0.5)
    """
    wins = sum(a > b for a, b in zip(ours, theirs, strict=True))
    losses = sum(a < b for a, b in zip(ours, theirs, strict=True))
    ties = len(ours) - wins - losses
    return WinRate(wins, ties, losses, (wins + ties / 2) / len(ours), sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
    """p-value of the exact two-sided sign test: how likely a split at least this uneven is for equal policies.

    >>> sign_test(5, 0)
    0.0625
    """
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams of a response that repeat an earlier one; 0 without 4-grams.

    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])
    0.2
    """
    ngrams = [tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def perplexity(total_logp: float, tokens: int) -> float:
    """exp of the mean negative log-prob of a token, capped to stay finite."""
    return math.exp(min(-total_logp / max(1, tokens), _LARGEST_EXPONENT))


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Linear interpolation at x between points (x, y); None outside their range.

    >>> interpolate([(0.0, 0.0), (2.0, 4.0)], 1.0)
    2.0
    """
    for (x0, y0), (x1, y1) in pairwise(sorted(points)):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.0)
    return None
