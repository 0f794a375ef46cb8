"""What the scores and weights of a whole split look like: summaries, histograms, curves, tokens, and checks of them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.engine.inspection.results import Check, Example, Histogram, Scale, Separation, SideSummary, TokenSummary
from tisdpo_cli.engine.inspection.weighted_split import WeightedResponse, WeightedSplit
from tisdpo_cli.errors import DataError
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.settings.groups import Checks

_CURVE_BINS = 24
_HISTOGRAM_BINS = 24
_SIZE_BINS = 20
_ROC_POINTS = 101
_EXAMPLES = 3
# Tokens shown on each side of an example.
_AROUND = 6


def summary(sides: Sequence[WeightedResponse], with_scores: bool, with_steps: bool) -> SideSummary:
    """One side of the file.

    Raises:
        DataError: no token of it is scored.
    """
    weights = torch.cat([side.weights for side in sides])
    if not len(weights):
        raise DataError("no token of this split is scored")
    scores = torch.cat([side.scored for side in sides]) if with_scores else None
    adjusted = torch.cat([side.adjusted for side in sides]) if with_steps else None
    sizes = [side.effective_size for side in sides if side.effective_size > 0]
    hit = torch.cat([side.clipped for side in sides])
    return SideSummary(
        tokens=sum(len(side.ids) for side in sides),
        unscored=sum(len(side.ids) - len(side.known) for side in sides),
        mean_score=_mean(scores),
        sd_score=_spread(scores),
        mean_adjusted=_mean(adjusted),
        sd_adjusted=_spread(adjusted),
        mean_weight=float(weights.mean()),
        sd_weight=float(weights.std(correction=0)),
        min_weight=float(weights.min()),
        max_weight=float(weights.max()),
        share_clipped=float(hit.float().mean()) if len(hit) else 0.0,
        effective_sample_size=statistics.fmean(sizes) if sizes else 0.0,
    )


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())


def _spread(values: Tensor | None) -> float | None:
    return None if values is None else float(values.std(correction=0))


def score_histogram(split: WeightedSplit) -> Histogram:
    """r of the tokens of both sides, from the 0.5th to the 99.5th percentile."""
    ordered = torch.cat([side.known for side in split.responses]).sort().values
    low, high = (float(ordered[int(q * (len(ordered) - 1))]) for q in (0.005, 0.995))
    return _histogram(split, lambda side: side.known, low, max(high, low + 1e-6), _HISTOGRAM_BINS)


def size_histogram(split: WeightedSplit) -> Histogram:
    """Effective sample sizes of the responses, as shares of their tokens."""
    return _histogram(split, lambda side: torch.tensor([side.effective_size]), 0.0, 1.0, _SIZE_BINS)


def _histogram(split: WeightedSplit, values: object, low: float, high: float, bins: int) -> Histogram:
    assert callable(values)
    edges = torch.linspace(low, high, bins + 1)
    counts = {}
    for number, name in enumerate(SIDES):
        column = torch.cat([values(side) for side in split.side(number)]).clamp(low, high)
        at = ((column - low) / (high - low) * bins).long().clamp(max=bins - 1)
        counts[name] = torch.bincount(at, minlength=bins).tolist()
    return Histogram(edges.tolist(), counts)


def curve(sides: Sequence[WeightedResponse], show: str) -> list[float]:
    """Mean of a shown value by relative position in the response."""
    sums, counts = torch.zeros(_CURVE_BINS), torch.zeros(_CURVE_BINS)
    for side in sides:
        values = side.values(show)
        bins = (torch.arange(len(values)) * _CURVE_BINS // max(1, len(values))).long()
        sums.index_add_(0, bins, values)
        counts.index_add_(0, bins, torch.ones_like(values))
    return (sums / counts.clamp(min=1)).tolist()


def scale(split: WeightedSplit, show: str) -> Scale:
    """The colour scale of a shown value. The EOS is left out: it may be set to zero."""
    values = torch.cat([side.values(show) for side in split.responses])
    if show != "weights":
        return Scale(0.0, _percentile(values.abs()), False)
    if bool((values > 0).all()):
        return Scale(1.0, _percentile(values.log().abs()), True)
    return Scale(1.0, _percentile((values - 1).abs()), False)


def _percentile(sizes: Tensor) -> float:
    ordered = sizes.sort().values
    return max(float(ordered[int(0.99 * (len(ordered) - 1))]), 1e-6)


def separation(split: WeightedSplit) -> Separation:
    """Whether Σ r tells chosen from rejected responses."""
    chosen, rejected = (torch.tensor([side.total for side in split.side(k)], dtype=torch.float64) for k in (0, 1))
    accuracy = float(((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean())
    n, m = len(chosen), len(rejected)
    auc = float((mean_ranks(torch.cat([chosen, rejected]))[:n].sum() - n * (n + 1) / 2) / (n * m))
    cuts = torch.cat([chosen, rejected]).sort(descending=True).values
    at = torch.linspace(0, len(cuts) - 1, min(_ROC_POINTS, len(cuts))).long()
    points = [(float((rejected >= c).double().mean()), float((chosen >= c).double().mean())) for c in cuts[at]]
    return Separation(accuracy, auc, [(0.0, 0.0), *points, (1.0, 1.0)])


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks [n] from 1, in float64; equal values share the mean of theirs."""
    _values, group, sizes = values.unique(sorted=True, return_inverse=True, return_counts=True)
    return (sizes.cumsum(0) - (sizes - 1).double() / 2)[group]


# Tokens --------------------------------------------------------------------------------------------------------


@dataclass
class _Occurrences:
    """Everything about one token id: where it is, and its values."""

    ranked: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)


class Tokens:
    """The tokens of a split by id, over both sides; the EOS is left out."""

    def __init__(self, split: WeightedSplit, min_count: int) -> None:
        self._split, self._min_count = split, min_count
        self._found: dict[int, _Occurrences] = defaultdict(_Occurrences)
        for number, pair in enumerate(split.pairs):
            for side, response in enumerate(pair.sides):
                values = zip(response.adjusted.tolist(), response.values("weights").tolist(), strict=True)
                for position, (at, (r, weight)) in enumerate(zip(response.known_ids, values, strict=True)):
                    entry = self._found[at]
                    entry.ranked.append(r)
                    entry.weights.append(weight)
                    entry.sides.append(side)
                    entry.places.append((number, side, position))
        self._often = {at: entry for at, entry in self._found.items() if len(entry.sides) >= min_count}

    def extremes(self, by: str, top: int) -> tuple[list[TokenSummary], list[TokenSummary]]:
        """The tokens with the highest and the lowest mean, of those that occur often enough.

        Args:
            by: `ranked`, the score after the steps, or `weights`.
            top: how many of each.
        """
        means = {at: statistics.fmean(getattr(entry, by)) for at, entry in self._often.items()}
        order = sorted(means, key=lambda at: (-means[at], at))
        return self._summaries(order[:top]), self._summaries(order[::-1][:top])

    def _summaries(self, ids: Sequence[int]) -> list[TokenSummary]:
        texts = self._split.how.tokenizer.labels(ids)
        return [self._summary(at, text) for at, text in zip(ids, texts, strict=True)]

    def _summary(self, at: int, text: str) -> TokenSummary:
        entry = self._found[at]
        count = len(entry.sides)
        # Spread over the file, the first occurrence included.
        picked = [entry.places[i * count // _EXAMPLES] for i in range(min(_EXAMPLES, count))]
        return TokenSummary(
            text=text,
            count=count,
            mean=statistics.fmean(entry.ranked),
            mean_weight=statistics.fmean(entry.weights),
            share_chosen=1 - sum(entry.sides) / count,
            examples=[self._example(*place) for place in picked],
        )

    def _example(self, number: int, side: int, position: int) -> Example:
        pair = self._split.pairs[number]
        ids, tokenizer = pair.sides[side].known_ids, self._split.how.tokenizer
        before, after = ids[max(0, position - _AROUND) : position], ids[position + 1 : position + 1 + _AROUND]
        return Example(pair.pair.index, SIDES[side], _text(tokenizer, before), _text(tokenizer, after))

    def offset(self) -> float | None:
        """How far r is off zero on tokens that say nothing: those that occur on both sides about as often.

        The mean over them, by count, of the smaller of the two sides' mean |r| where both have the same sign; in nats.
        None where there is no such token.
        """
        total, weight = 0.0, 0
        for entry in self._often.values():
            share = 1 - sum(entry.sides) / len(entry.sides)
            if not 0.35 <= share <= 0.65:
                continue
            means = [
                statistics.fmean(r for r, s in zip(entry.ranked, entry.sides, strict=True) if s == side)
                for side in (0, 1)
            ]
            same = means[0] * means[1] > 0
            total += len(entry.sides) * (min(map(abs, means)) if same else 0.0)
            weight += len(entry.sides)
        return total / weight if weight else None


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return "".join(tokenizer.labels(ids))


# Checks --------------------------------------------------------------------------------------------------------


def checks(split: WeightedSplit, bounds: Checks, sides: Mapping[str, SideSummary], offset: float | None) -> list[Check]:
    """Hold a split against its bounds. A file of final weights has no scores to check."""
    every = sum(side.tokens for side in sides.values())
    unscored = sum(side.unscored for side in sides.values()) / every if every else 0.0
    cut = _check(
        "unscored tokens", unscored, bounds.max_unscored, False,
        "most tokens lie beyond the cut and have no score",
        "score with a larger --max-length",
    )  # fmt: skip
    if split.final:
        return [cut]
    spread = float(torch.cat([side.adjusted for side in split.responses]).std(correction=0))
    clipped = max(side.share_clipped for side in sides.values())
    return [
        _check(
            "spread of r", spread, bounds.min_spread, True,
            "the scores hardly vary: both sides of the contrast say the same of every token",
            "train the contrastive models longer, with a shorter --warmup-steps or a higher --learning-rate; under two "
            "prompts of one model, take others, or a model that listens to them",
        ),
        _check(
            "pairs that Σr separates", separation(split).accuracy, bounds.min_separation, True,
            "the scores hardly know the preference: Σr is often higher on the rejected side",
            "look at the held-out accuracy of both contrastive models, and that neither was swapped",
        ),
        _check(
            "drift with the position", _in_spreads(_drift(split), spread), bounds.max_drift, False,
            "r changes with the position, whatever the token is",
            "weigh with --center position, or --decay",
        ),
        _check(
            "offset on neutral tokens", _in_spreads(offset, spread), bounds.max_offset, False,
            "r is off zero on tokens that both sides have alike, and the transform amplifies that",
            "weigh with --center dataset, or a --dead-zone",
        ),
        _check(
            "clipped scores", clipped, bounds.max_clipped, False,
            "the transform clips most scores of a side, so their size is lost",
            "widen its clamp (--L and --U of exp), or train the contrastive models more lightly",
        ),
        cut,
    ]  # fmt: skip


def _check(name: str, value: float | None, bound: float, at_least: bool, says: str, fix: str) -> Check:
    passed = value is None or math.isnan(value) or (value >= bound if at_least else value <= bound)
    return Check(name, value, bound, at_least, passed, says, fix)


def _in_spreads(value: float | None, spread: float) -> float | None:
    return None if value is None or spread == 0 else value / spread


def _drift(split: WeightedSplit) -> float | None:
    """How much r differs between the first and the last third of responses, as a mean over both sides; in nats."""
    thirds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for side in split.responses:
        size = len(side.adjusted) // 3
        if size:
            thirds[0].append(side.adjusted[:size])
            thirds[1].append(side.adjusted[-size:])
    if not thirds[0]:
        return None
    first, last = (float(torch.cat(values).mean()) for values in thirds)
    return abs(first - last)
