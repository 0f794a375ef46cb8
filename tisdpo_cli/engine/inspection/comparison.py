"""How two transforms, or two scored datasets, differ token by token."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.engine.inspection.results import Comparison, RankDifference
from tisdpo_cli.engine.inspection.summaries import mean_ranks
from tisdpo_cli.engine.inspection.weighted_split import WeightedResponse, WeightedSplit, read_weighted_split
from tisdpo_cli.errors import DataError
from tisdpo_cli.settings.groups import is_recipe
from tisdpo_cli.settings.inspect_weights import InspectWeights

# Closer to neutral than this is neutral: float32 rounding is no opinion.
_NEUTRAL = 1e-6


def compare(settings: InspectWeights, split: WeightedSplit, eos_scores: bool) -> Comparison:
    """Compare a split with what the settings name.

    Raises:
        DataError: the other dataset holds other responses.
    """
    other = settings.compare
    assert other is not None
    if is_recipe(other):
        recipe = settings.weights.other_recipe(other, eos_scores)
        names = split.how.recipe.describe(), recipe.describe()
        return _compared(split, split.under(recipe), names, "weights", settings)
    names = settings.scored, other
    return _compared(
        split, read_weighted_split(settings, other), names, "weights" if split.final else "scores", settings
    )


def _compared(
    one: WeightedSplit, two: WeightedSplit, names: tuple[str, str], of: str, settings: InspectWeights
) -> Comparison:
    def value(side: WeightedResponse) -> Tensor:
        return side.values(of)

    ids, first, second, lengths = _aligned(one, two, names[1], value)
    if not len(ids):
        raise DataError("no token has a score in both", where=names[1])
    neutral = 1.0 if of == "weights" else 0.0
    decided = ((first - neutral).abs() > _NEUTRAL) & ((second - neutral).abs() > _NEUTRAL)
    same = ((first > neutral) == (second > neutral))[decided]
    ranks = [(mean_ranks(v) - 0.5) / len(v) for v in (first, second)]
    within = [
        r
        for a, b in zip(first.split(lengths), second.split(lengths), strict=True)
        if (r := _correlation(mean_ranks(a), mean_ranks(b))) is not None
    ]
    return Comparison(
        first=names[0],
        second=names[1],
        of=of,
        tokens=len(ids),
        agreement=float(same.double().mean()) if len(same) else 1.0,
        rank_correlation=_correlation(ranks[0], ranks[1]) or 0.0,
        within=statistics.fmean(within) if within else 0.0,
        differing=_differing(one, ids, torch.stack([first, second, *ranks], 1), settings),
    )


def _aligned(
    one: WeightedSplit, two: WeightedSplit, name: str, value: Callable[[WeightedResponse], Tensor]
) -> tuple[list[int], Tensor, Tensor, list[int]]:
    """Tokens that have a value in both, with both values, and how many of each response there are."""
    others = {pair.pair.index: pair for pair in two.pairs}
    ids: list[int] = []
    lengths: list[int] = []
    values: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pair in one.pairs:
        other = others.get(pair.pair.index)
        if other is None:
            continue
        for side, a, b in zip(SIDES, pair.sides, other.sides, strict=True):
            if a.ids != b.ids:
                told = f"pair {pair.pair.index} has another {side} response, or another tokenizer"
                raise DataError(told, where=name, fix="compare two scorings of the same rows")
            both = [r is not None and s is not None for r, s in zip(a.scores.tokens, b.scores.tokens, strict=True)]
            ids += [at for at, known in zip(a.ids, both, strict=True) if known]
            lengths.append(sum(both))
            for column, response in zip(values, (a, b), strict=True):
                known = [k for k, r in zip(both, response.scores.tokens, strict=True) if r is not None]
                column.append(value(response)[torch.tensor(known, dtype=torch.bool)].double())
    empty = torch.zeros(0, dtype=torch.float64)
    return ids, torch.cat([empty, *values[0]]), torch.cat([empty, *values[1]]), lengths


def _correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's; None where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size else None


def _differing(split: WeightedSplit, ids: list[int], columns: Tensor, settings: InspectWeights) -> list[RankDifference]:
    rows: dict[int, list[int]] = defaultdict(list)
    for row, at in enumerate(ids):
        rows[at].append(row)
    means = {at: columns[rows[at]].mean(0).tolist() for at in rows if len(rows[at]) >= settings.min_count}
    order = sorted(means, key=lambda at: (-abs(means[at][2] - means[at][3]), at))[: settings.top]
    texts = split.how.tokenizer.labels(order)
    return [RankDifference(text, len(rows[at]), *means[at]) for at, text in zip(order, texts, strict=True)]
