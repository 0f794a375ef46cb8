"""Tokens of a split over all their occurrences: extreme scores and weights, and the offset of neutral tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.engine.inspection.exact_sums import ExactSums
from tisdpo_cli.engine.inspection.results import Example, TokenSummary
from tisdpo_cli.engine.inspection.split_columns import SplitColumns
from tisdpo_cli.model.tokenizer import Tokenizer

_EXAMPLES = 3
# Tokens of context on each side of an example.
_CONTEXT = 6
# Share of chosen occurrences of a token that is equally common on both sides.
_BALANCED = (0.35, 0.65)


class TokenIndex:
    """Scored tokens of both sides of a split by id, without the EOS.

    Counts and sums are kept for each id on each side: the group of an id is 2 · id, plus 1 on the rejected side.
    """

    def __init__(self, columns: SplitColumns, tokenizer: Tokenizer, min_count: int) -> None:
        self._columns, self._tokenizer = columns, tokenizer
        groups = 2 * (1 + max((int(block.ids.max()) for block in columns.blocks() if len(block.ids)), default=-1))
        self._sums = {"ranked": ExactSums(groups), "weights": ExactSums(groups)}
        self._counts = np.zeros(groups, np.int64)
        # Ids in the order of their first occurrence.
        ids: dict[int, None] = {}
        for block in columns.blocks():
            group = 2 * block.ids.astype(np.int64) + block.sides
            self._sums["ranked"].add(group, block.adjusted)
            self._sums["weights"].add(group, block.weights)
            self._counts += np.bincount(group, minlength=groups)
            found, first = np.unique(block.ids, return_index=True)
            ids.update(dict.fromkeys(found[np.argsort(first)].tolist()))
        self._frequent = [token_id for token_id in ids if self._count(token_id) >= min_count]

    def extremes(self, by: str, top: int) -> tuple[list[TokenSummary], list[TokenSummary]]:
        """The frequent tokens with the highest and with the lowest mean.

        Args:
            by: `ranked` for r after the steps, or `weights`.
            top: number of tokens in each list.
        """
        means = {token_id: self._mean(by, token_id) for token_id in self._frequent}
        order = sorted(means, key=lambda token_id: (-means[token_id], token_id))
        places = self._places({*order[:top], *order[::-1][:top]})
        return self._summaries(order[:top], places), self._summaries(order[::-1][:top], places)

    def offset(self) -> float | None:
        """How far r is from zero, in nats, on neutral tokens: those about equally common on both sides.

        The count-weighted mean over these tokens of the smaller of both sides' |mean r|, or of 0 if the means have
        different signs. None without such tokens.
        """
        total, weight = 0.0, 0
        for token_id in self._frequent:
            if not _BALANCED[0] <= self._share_chosen(token_id) <= _BALANCED[1]:
                continue
            groups = (2 * token_id, 2 * token_id + 1)
            means = [self._sums["ranked"].sum(group) / int(self._counts[group]) for group in groups]
            same_sign = means[0] * means[1] > 0
            total += self._count(token_id) * (min(map(abs, means)) if same_sign else 0.0)
            weight += self._count(token_id)
        return total / weight if weight else None

    def _count(self, token_id: int) -> int:
        return int(self._counts[2 * token_id] + self._counts[2 * token_id + 1])

    def _share_chosen(self, token_id: int) -> float:
        return 1 - int(self._counts[2 * token_id + 1]) / self._count(token_id)

    def _mean(self, by: str, token_id: int) -> float:
        return self._sums[by].sum(2 * token_id, 2 * token_id + 1) / self._count(token_id)

    def _places(self, ids: set[int]) -> dict[int, list[int]]:
        """Numbers of the tokens that are shown as examples of some ids."""
        # Spread over the file, starting with the first occurrence.
        wanted = {i: [k * self._count(i) // _EXAMPLES for k in range(min(_EXAMPLES, self._count(i)))] for i in ids}
        found: dict[int, list[int]] = {token_id: [] for token_id in ids}
        seen = dict.fromkeys(ids, 0)
        for block in self._columns.blocks():
            shown = np.flatnonzero(np.isin(block.ids, list(ids)))
            for token_id in ids:
                here = shown[block.ids[shown] == token_id]
                numbers = (number - seen[token_id] for number in wanted[token_id])
                found[token_id] += [block.begin + int(here[n]) for n in numbers if 0 <= n < len(here)]
                seen[token_id] += len(here)
        return found

    def _summaries(self, ids: Sequence[int], places: Mapping[int, Sequence[int]]) -> list[TokenSummary]:
        return [
            TokenSummary(
                text=text,
                count=self._count(token_id),
                mean=self._mean("ranked", token_id),
                mean_weight=self._mean("weights", token_id),
                share_chosen=self._share_chosen(token_id),
                examples=[self._example(place) for place in places[token_id]],
            )
            for token_id, text in zip(ids, self._tokenizer.labels(ids), strict=True)
        ]

    def _example(self, place: int) -> Example:
        ends = self._columns.ends.array()
        response = int(np.searchsorted(ends, place, "right"))
        begin, end = int(ends[response - 1]) if response else 0, int(ends[response])
        ids = self._columns.ids.array()
        before, after = ids[max(begin, place - _CONTEXT) : place], ids[place + 1 : min(end, place + 1 + _CONTEXT)]
        pair, side = divmod(response, len(SIDES))
        index = int(self._columns.indices.array()[pair])
        return Example(
            index, SIDES[side], *("".join(self._tokenizer.labels(part.tolist())) for part in (before, after))
        )
