"""Summaries of the scores and weights of a whole split: statistics, histograms, colour scales, separation."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.engine.inspection.disk_arrays import blocks, mean_ranks, order_statistics
from tisdpo_cli.engine.inspection.results import Histogram, Scale, Separation, SideSummary
from tisdpo_cli.engine.inspection.split_columns import SideColumns, SplitColumns
from tisdpo_cli.errors import DataError

_HISTOGRAM_BINS = 24
_SIZE_BINS = 20
_ROC_POINTS = 101


def side_summary(side: SideColumns, with_scores: bool, with_steps: bool) -> SideSummary:
    """Summarize one side of a split.

    Args:
        side: all chosen or all rejected responses.
        with_scores: whether the split holds scores, not final weights.
        with_steps: whether the recipe has steps before the transform.

    Raises:
        DataError: no token of this side is scored.
    """
    weights = side.weights.tensor()
    if not len(weights):
        raise DataError("no token of this split is scored")
    scores = side.scored.tensor() if with_scores else None
    adjusted = side.adjusted.tensor() if with_steps else None
    sizes = side.sizes.array()
    known = len(side.known)
    return SideSummary(
        tokens=side.tokens,
        unscored=side.tokens - known,
        mean_score=_mean(scores),
        sd_score=_standard_deviation(scores),
        mean_adjusted=_mean(adjusted),
        sd_adjusted=_standard_deviation(adjusted),
        mean_weight=float(weights.mean()),
        sd_weight=float(weights.std(correction=0)),
        min_weight=float(weights.min()),
        max_weight=float(weights.max()),
        share_clipped=float(np.float32(side.clipped) / np.float32(known)) if known else 0.0,
        effective_sample_size=statistics.fmean(sizes[sizes > 0]) if (sizes > 0).any() else 0.0,
    )


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())


def _standard_deviation(values: Tensor | None) -> float | None:
    return None if values is None else float(values.std(correction=0))


def score_histogram(columns: SplitColumns) -> Histogram:
    """Histogram of r by side, from the 0.5th to the 99.5th percentile of both sides."""
    both = [side.known.tensor() for side in columns.sides]
    parts = (part for values in both for part in blocks(values))
    low, high = order_statistics(parts, sum(map(len, both)), (0.005, 0.995))
    return _histogram(both, low, max(high, low + 1e-6), _HISTOGRAM_BINS)


def size_histogram(columns: SplitColumns) -> Histogram:
    """Histogram of effective sample sizes by side, as shares of the tokens of a response."""
    return _histogram([side.sizes.tensor() for side in columns.sides], 0.0, 1.0, _SIZE_BINS)


def _histogram(sides: list[Tensor], low: float, high: float, bins: int) -> Histogram:
    edges = torch.linspace(low, high, bins + 1)
    counts = {}
    for name, values in zip(SIDES, sides, strict=True):
        found = torch.zeros(bins, dtype=torch.int64)
        for part in blocks(values):
            indices = ((part.float().clamp(low, high) - low) / (high - low) * bins).long().clamp(max=bins - 1)
            found += torch.bincount(indices, minlength=bins)
        counts[name] = found.tolist()
    return Histogram(edges.tolist(), counts)


def colour_scale(columns: SplitColumns, show: str) -> Scale:
    """Colour scale of `scores`, `adjusted`, `weights`, or the weights under another recipe by its name.

    The EOS is left out because it may be set to zero.
    """
    if show == "scores":
        return Scale(0.0, _percentile([side.known.tensor() for side in columns.sides], torch.abs), False)
    if show == "adjusted":
        return Scale(0.0, _percentile([columns.adjusted.tensor()], torch.abs), False)
    weights = (columns.weights if show == "weights" else columns.previews[show]).tensor()
    if all(bool((part > 0).all()) for part in blocks(weights)):
        return Scale(1.0, _percentile([weights], lambda part: part.log().abs()), True)
    return Scale(1.0, _percentile([weights], lambda part: (part - 1).abs()), False)


def _percentile(columns: list[Tensor], size: Callable[[Tensor], Tensor]) -> float:
    """The 99th percentile of the sizes of some values, at least 1e-6."""
    parts = (size(part) for values in columns for part in blocks(values))
    (found,) = order_statistics(parts, sum(map(len, columns)), (0.99,))
    return max(found, 1e-6)


def separation(columns: SplitColumns) -> Separation:
    """How well Σ r separates chosen from rejected responses."""
    chosen, rejected = (side.totals.tensor() for side in columns.sides)
    n, m = len(chosen), len(rejected)
    accuracy = (int((chosen > rejected).sum()) + 0.5 * int((chosen == rejected).sum())) / n
    both = torch.cat([chosen, rejected])
    auc = float((mean_ranks(both)[:n].sum() - n * (n + 1) / 2) / (n * m))
    ordered = both.sort(descending=True).values
    indices = torch.linspace(0, len(ordered) - 1, min(_ROC_POINTS, len(ordered))).long()
    points = [
        (int((rejected >= threshold).sum()) / m, int((chosen >= threshold).sum()) / n) for threshold in ordered[indices]
    ]
    return Separation(accuracy, auc, [(0.0, 0.0), *points, (1.0, 1.0)])
