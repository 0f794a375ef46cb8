"""How two transforms, or two scored datasets, differ token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import fsum
from typing import Literal

import numpy as np
import torch

from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.engine.inspection.disk_arrays import BLOCK, Column, correlation, mean_ranks, spans
from tisdpo_cli.engine.inspection.results import Comparison, RankDifference
from tisdpo_cli.engine.inspection.weighted_pairs import InspectedPair
from tisdpo_cli.engine.inspection.weighted_split import WeightedSplit
from tisdpo_cli.errors import DataError

# Values closer to neutral than this are neutral: float32 rounding has no direction.
_NEUTRAL = 1e-6


@dataclass(frozen=True)
class _Both:
    """Tokens that are scored in both.

    Attributes:
        ids: of the tokens.
        first: values of the one.
        second: values of the other.
        ends: number of tokens up to the end of each response.
    """

    ids: Column = field(default_factory=lambda: Column(np.int32))
    first: Column = field(default_factory=lambda: Column(np.float32))
    second: Column = field(default_factory=lambda: Column(np.float32))
    ends: Column = field(default_factory=lambda: Column(np.int64))


def compare_recipes(split: WeightedSplit, name: str, top: int, min_count: int) -> Comparison:
    """Compare the weights of a split with those of another recipe.

    Args:
        split: of scores, not of final weights.
        name: of the other recipe, in the split.
        top: number of tokens to list.
        min_count: occurrences a listed token needs.

    Raises:
        DataError: no token is scored.
    """
    columns = split.columns
    both = _Both(columns.ids, columns.weights, columns.previews[name], columns.ends)
    names = split.weighter.recipe.describe(), split.others[name].describe()
    return _compare(split, both, names, "weights", top, min_count)


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
    show: Literal["weights", "scores"] = "weights" if first.final else "scores"
    return _compare(first, _aligned(first, second, names[1], show), names, show, top, min_count)


def _compare(
    split: WeightedSplit,
    both: _Both,
    names: tuple[str, str],
    show: Literal["weights", "scores"],
    top: int,
    min_count: int,
) -> Comparison:
    count = len(both.ids)
    if not count:
        raise DataError("no token is scored in both datasets", where=names[1])
    ours, theirs = both.first.tensor(), both.second.tensor()
    neutral = 1.0 if show == "weights" else 0.0
    decided = same = 0
    for begin in range(0, count, BLOCK):
        a, b = (values[begin : begin + BLOCK].double() for values in (ours, theirs))
        here = ((a - neutral).abs() > _NEUTRAL) & ((b - neutral).abs() > _NEUTRAL)
        decided += int(here.sum())
        same += int(((a > neutral) == (b > neutral))[here].sum())
    ranks = mean_ranks(ours), mean_ranks(theirs)
    for column in ranks:
        column.sub_(0.5).div_(count)
    within = Column(np.float64)
    for begin, end in spans(both.ends):
        r = correlation(mean_ranks(ours[begin:end]), mean_ranks(theirs[begin:end]))
        if r is not None:
            within.append([r])
    return Comparison(
        first=names[0],
        second=names[1],
        of=show,
        tokens=count,
        agreement=same / decided if decided else 1.0,
        rank_correlation=correlation(*ranks) or 0.0,
        within=fsum(within.array()) / len(within) if len(within) else 0.0,
        differing=_differing(split, both, ranks, top, min_count),
    )


def _aligned(first: WeightedSplit, second: WeightedSplit, name: str, show: Literal["weights", "scores"]) -> _Both:
    """The tokens scored in both splits."""
    both = _Both()
    for pair, other in _same_index(iter(first), iter(second)):
        for side, a, b in zip(SIDES, pair.sides, other.sides, strict=True):
            if a.ids != b.ids:
                raise DataError(
                    f"pair {pair.pair.index} has a different {side} response or tokenizer",
                    where=name,
                    fix="compare two scored datasets with the same rows",
                )
            shared = [r is not None and s is not None for r, s in zip(a.scores.tokens, b.scores.tokens, strict=True)]
            both.ids.append([token_id for token_id, scored in zip(a.ids, shared, strict=True) if scored])
            both.ends.append([len(both.ids)])
            for column, response in zip((both.first, both.second), (a, b), strict=True):
                kept = [k for k, r in zip(shared, response.scores.tokens, strict=True) if r is not None]
                column.append(response.values(show)[torch.tensor(kept, dtype=torch.bool)])
    return both


def _same_index(
    first: Iterator[InspectedPair], second: Iterator[InspectedPair]
) -> Iterator[tuple[InspectedPair, InspectedPair]]:
    """The pairs of both that have the same index; both are in the order of their indices."""
    other = next(second, None)
    for pair in first:
        while other is not None and other.pair.index < pair.pair.index:
            other = next(second, None)
        if other is None:
            return
        if other.pair.index == pair.pair.index:
            yield pair, other


def _differing(
    split: WeightedSplit, both: _Both, ranks: tuple[torch.Tensor, torch.Tensor], top: int, min_count: int
) -> list[RankDifference]:
    """The tokens with the largest difference of mean ranks.

    Args:
        split: whose tokenizer names the tokens.
        both: ids and values.
        ranks: [n] both ranks of each token.
        top: number of tokens to list.
        min_count: occurrences a listed token needs.
    """
    ids = both.ids.array()
    columns = [both.first.array(), both.second.array(), *(values.numpy() for values in ranks)]
    size = int(ids.max()) + 1
    counts, sums = np.zeros(size, np.int64), np.zeros((len(columns), size))
    for begin in range(0, len(ids), BLOCK):
        part = slice(begin, begin + BLOCK)
        counts += np.bincount(ids[part], minlength=size)
        for total, column in zip(sums, columns, strict=True):
            total += np.bincount(ids[part], column[part], minlength=size)
    frequent = np.flatnonzero(counts >= min_count)
    means = {int(token_id): (sums[:, token_id] / counts[token_id]).tolist() for token_id in frequent}
    order = sorted(means, key=lambda token_id: (-abs(means[token_id][2] - means[token_id][3]), token_id))[:top]
    texts = split.weighter.tokenizer.labels(order)
    return [
        RankDifference(text, int(counts[token_id]), *means[token_id])
        for token_id, text in zip(order, texts, strict=True)
    ]
