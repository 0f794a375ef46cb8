"""How two transforms, or two scored datasets, differ token by token."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.engine.inspection.results import Comparison, RankDifference
from tisdpo_cli.engine.inspection.summaries import mean_ranks
from tisdpo_cli.engine.inspection.weighted_split import WeightedResponse, WeightedSplit
from tisdpo_cli.errors import DataError
from tisdpo_cli.method.recipe import Recipe

# Values closer to neutral than this are neutral: float32 rounding has no direction.
_NEUTRAL = 1e-6


def compare_recipes(split: WeightedSplit, recipe: Recipe, top: int, min_count: int) -> Comparison:
    """Compare the weights of a split with those of another recipe.

    Args:
        split: of scores, not of final weights.
        recipe: with the same steps.
        top: number of tokens to list.
        min_count: occurrences a listed token needs.

    Raises:
        DataError: no token is scored.
    """
    names = split.weighter.recipe.describe(), recipe.describe()
    return _compare(split, split.under(recipe), names, "weights", top, min_count)


def compare_datasets(
    first: WeightedSplit, second: WeightedSplit, names: tuple[str, str], top: int, min_count: int
) -> Comparison:
    """Compare the scores, or the final weights, of two datasets with the same responses.

    Args:
        first: split of the inspected dataset.
        second: the same split of the other dataset.
        names: of both datasets.
        top: number of tokens to list.
        min_count: occurrences a listed token needs.

    Raises:
        DataError: the responses differ, or no token is scored in both.
    """
    return _compare(first, second, names, "weights" if first.final else "scores", top, min_count)


def _compare(
    first: WeightedSplit,
    second: WeightedSplit,
    names: tuple[str, str],
    show: Literal["weights", "scores"],
    top: int,
    min_count: int,
) -> Comparison:
    ids, ours, theirs, lengths = _aligned(first, second, names[1], lambda response: response.values(show))
    if not len(ids):
        raise DataError("no token is scored in both datasets", where=names[1])
    neutral = 1.0 if show == "weights" else 0.0
    decided = ((ours - neutral).abs() > _NEUTRAL) & ((theirs - neutral).abs() > _NEUTRAL)
    same_direction = ((ours > neutral) == (theirs > neutral))[decided]
    ranks = [(mean_ranks(values) - 0.5) / len(values) for values in (ours, theirs)]
    within = [
        r
        for a, b in zip(ours.split(lengths), theirs.split(lengths), strict=True)
        if (r := _correlation(mean_ranks(a), mean_ranks(b))) is not None
    ]
    columns = torch.stack([ours, theirs, *ranks], 1)
    return Comparison(
        first=names[0],
        second=names[1],
        of=show,
        tokens=len(ids),
        agreement=float(same_direction.double().mean()) if len(same_direction) else 1.0,
        rank_correlation=_correlation(ranks[0], ranks[1]) or 0.0,
        within=statistics.fmean(within) if within else 0.0,
        differing=_differing(first, ids, columns, top, min_count),
    )


def _aligned(
    first: WeightedSplit, second: WeightedSplit, name: str, value: Callable[[WeightedResponse], Tensor]
) -> tuple[list[int], Tensor, Tensor, list[int]]:
    """Ids [n] of the tokens scored in both splits, both values [n] of each, and their number in each response."""
    others = {pair.pair.index: pair for pair in second.pairs}
    ids: list[int] = []
    lengths: list[int] = []
    values: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pair in first.pairs:
        other = others.get(pair.pair.index)
        if other is None:
            continue
        for side, a, b in zip(SIDES, pair.sides, other.sides, strict=True):
            if a.ids != b.ids:
                raise DataError(
                    f"pair {pair.pair.index} has a different {side} response or tokenizer",
                    where=name,
                    fix="compare two scored datasets with the same rows",
                )
            both = [r is not None and s is not None for r, s in zip(a.scores.tokens, b.scores.tokens, strict=True)]
            ids += [token_id for token_id, scored in zip(a.ids, both, strict=True) if scored]
            lengths.append(sum(both))
            for column, response in zip(values, (a, b), strict=True):
                shared = [k for k, r in zip(both, response.scores.tokens, strict=True) if r is not None]
                column.append(value(response)[torch.tensor(shared, dtype=torch.bool)].double())
    empty = torch.zeros(0, dtype=torch.float64)
    return ids, torch.cat([empty, *values[0]]), torch.cat([empty, *values[1]]), lengths


def _correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's r of two tensors [n]; None if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size else None


def _differing(split: WeightedSplit, ids: list[int], columns: Tensor, top: int, min_count: int) -> list[RankDifference]:
    """The tokens with the largest difference of mean ranks.

    Args:
        split: whose tokenizer names the tokens.
        ids: [n] token ids.
        columns: [n, 4] both values and both ranks of each token.
        top: number of tokens to list.
        min_count: occurrences a listed token needs.
    """
    rows: dict[int, list[int]] = defaultdict(list)
    for row, token_id in enumerate(ids):
        rows[token_id].append(row)
    means = {
        token_id: columns[places].mean(0).tolist() for token_id, places in rows.items() if len(places) >= min_count
    }
    order = sorted(means, key=lambda token_id: (-abs(means[token_id][2] - means[token_id][3]), token_id))[:top]
    texts = split.weighter.tokenizer.labels(order)
    return [
        RankDifference(text, len(rows[token_id]), *means[token_id]) for token_id, text in zip(order, texts, strict=True)
    ]
