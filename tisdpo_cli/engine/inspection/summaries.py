"""Summaries of the scores and weights of a whole split: statistics, histograms, curves, colour scales, separation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.engine.inspection.results import Histogram, Scale, Separation, SideSummary
from tisdpo_cli.engine.inspection.weighted_split import WeightedResponse, WeightedSplit
from tisdpo_cli.errors import DataError

_CURVE_BINS = 24
_HISTOGRAM_BINS = 24
_SIZE_BINS = 20
_ROC_POINTS = 101


def side_summary(responses: Sequence[WeightedResponse], with_scores: bool, with_steps: bool) -> SideSummary:
    """Summarize one side of a split.

    Args:
        responses: all chosen or all rejected responses.
        with_scores: whether the split holds scores, not final weights.
        with_steps: whether the recipe has steps before the transform.

    Raises:
        DataError: no token of this side is scored.
    """
    weights = torch.cat([response.weights for response in responses])
    if not len(weights):
        raise DataError("no token of this split is scored")
    scores = torch.cat([response.scored for response in responses]) if with_scores else None
    adjusted = torch.cat([response.adjusted for response in responses]) if with_steps else None
    sizes = [response.effective_size for response in responses if response.effective_size > 0]
    clipped = torch.cat([response.clipped for response in responses])
    return SideSummary(
        tokens=sum(len(response.ids) for response in responses),
        unscored=sum(len(response.ids) - len(response.known) for response in responses),
        mean_score=_mean(scores),
        sd_score=_standard_deviation(scores),
        mean_adjusted=_mean(adjusted),
        sd_adjusted=_standard_deviation(adjusted),
        mean_weight=float(weights.mean()),
        sd_weight=float(weights.std(correction=0)),
        min_weight=float(weights.min()),
        max_weight=float(weights.max()),
        share_clipped=float(clipped.float().mean()) if len(clipped) else 0.0,
        effective_sample_size=statistics.fmean(sizes) if sizes else 0.0,
    )


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())


def _standard_deviation(values: Tensor | None) -> float | None:
    return None if values is None else float(values.std(correction=0))


def score_histogram(split: WeightedSplit) -> Histogram:
    """Histogram of r by side, from the 0.5th to the 99.5th percentile of both sides."""
    ordered = torch.cat([response.known for response in split.responses]).sort().values
    low, high = (float(ordered[int(q * (len(ordered) - 1))]) for q in (0.005, 0.995))
    return _histogram(split, lambda response: response.known, low, max(high, low + 1e-6), _HISTOGRAM_BINS)


def size_histogram(split: WeightedSplit) -> Histogram:
    """Histogram of effective sample sizes by side, as shares of the tokens of a response."""
    return _histogram(split, lambda response: torch.tensor([response.effective_size]), 0.0, 1.0, _SIZE_BINS)


def _histogram(
    split: WeightedSplit, values: Callable[[WeightedResponse], Tensor], low: float, high: float, bins: int
) -> Histogram:
    edges = torch.linspace(low, high, bins + 1)
    counts = {}
    for number, name in enumerate(SIDES):
        column = torch.cat([values(response) for response in split.side(number)]).clamp(low, high)
        indices = ((column - low) / (high - low) * bins).long().clamp(max=bins - 1)
        counts[name] = torch.bincount(indices, minlength=bins).tolist()
    return Histogram(edges.tolist(), counts)


def position_curve(responses: Sequence[WeightedResponse], show: str) -> list[float]:
    """Mean of `scores`, `adjusted` or `weights` by relative position in the response."""
    sums, counts = torch.zeros(_CURVE_BINS), torch.zeros(_CURVE_BINS)
    for response in responses:
        values = response.values(show)
        bins = (torch.arange(len(values)) * _CURVE_BINS // max(1, len(values))).long()
        sums.index_add_(0, bins, values)
        counts.index_add_(0, bins, torch.ones_like(values))
    return (sums / counts.clamp(min=1)).tolist()


def colour_scale(split: WeightedSplit, show: str) -> Scale:
    """Colour scale of `scores`, `adjusted` or `weights`. The EOS is left out because it may be set to zero."""
    values = torch.cat([response.values(show) for response in split.responses])
    if show != "weights":
        return Scale(0.0, _percentile(values.abs()), False)
    if bool((values > 0).all()):
        return Scale(1.0, _percentile(values.log().abs()), True)
    return Scale(1.0, _percentile((values - 1).abs()), False)


def _percentile(sizes: Tensor) -> float:
    """The 99th percentile, at least 1e-6."""
    ordered = sizes.sort().values
    return max(float(ordered[int(0.99 * (len(ordered) - 1))]), 1e-6)


def separation(split: WeightedSplit) -> Separation:
    """How well Σ r separates chosen from rejected responses."""
    chosen, rejected = (
        torch.tensor([response.total for response in split.side(k)], dtype=torch.float64) for k in (0, 1)
    )
    accuracy = float(((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean())
    n, m = len(chosen), len(rejected)
    auc = float((mean_ranks(torch.cat([chosen, rejected]))[:n].sum() - n * (n + 1) / 2) / (n * m))
    ordered = torch.cat([chosen, rejected]).sort(descending=True).values
    indices = torch.linspace(0, len(ordered) - 1, min(_ROC_POINTS, len(ordered))).long()
    points = [
        (float((rejected >= threshold).double().mean()), float((chosen >= threshold).double().mean()))
        for threshold in ordered[indices]
    ]
    return Separation(accuracy, auc, [(0.0, 0.0), *points, (1.0, 1.0)])


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks [n] from 1, in float64; equal values share their mean rank."""
    _values, group, sizes = values.unique(sorted=True, return_inverse=True, return_counts=True)
    return (sizes.cumsum(0) - (sizes - 1).double() / 2)[group]
