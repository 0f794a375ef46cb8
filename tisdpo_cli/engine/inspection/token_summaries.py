"""Tokens of a split over all their occurrences: extreme scores and weights, and the offset of neutral tokens."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.engine.inspection.results import Example, TokenSummary
from tisdpo_cli.engine.inspection.weighted_split import WeightedSplit
from tisdpo_cli.model.tokenizer import Tokenizer

_EXAMPLES = 3
# Tokens of context on each side of an example.
_CONTEXT = 6
# Share of chosen occurrences of a token that is equally common on both sides.
_BALANCED = (0.35, 0.65)


@dataclass
class _Occurrences:
    """All occurrences of one token id.

    Attributes:
        ranked: r after the steps.
        sides: 0 for chosen, 1 for rejected.
        places: pair number in the split, side, position among the scored tokens.
    """

    ranked: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def share_chosen(self) -> float:
        return 1 - sum(self.sides) / len(self.sides)


class TokenIndex:
    """Scored tokens of both sides of a split by id, without the EOS."""

    def __init__(self, split: WeightedSplit, min_count: int) -> None:
        self._split = split
        self._occurrences: dict[int, _Occurrences] = defaultdict(_Occurrences)
        for number, pair in enumerate(split.pairs):
            for side, response in enumerate(pair.sides):
                values = zip(response.adjusted.tolist(), response.values("weights").tolist(), strict=True)
                for position, (token_id, (r, weight)) in enumerate(zip(response.known_ids, values, strict=True)):
                    entry = self._occurrences[token_id]
                    entry.ranked.append(r)
                    entry.weights.append(weight)
                    entry.sides.append(side)
                    entry.places.append((number, side, position))
        self._frequent = {
            token_id: entry for token_id, entry in self._occurrences.items() if len(entry.sides) >= min_count
        }

    def extremes(self, by: str, top: int) -> tuple[list[TokenSummary], list[TokenSummary]]:
        """The frequent tokens with the highest and with the lowest mean.

        Args:
            by: `ranked` for r after the steps, or `weights`.
            top: number of tokens in each list.
        """
        means = {token_id: statistics.fmean(getattr(entry, by)) for token_id, entry in self._frequent.items()}
        order = sorted(means, key=lambda token_id: (-means[token_id], token_id))
        return self._summaries(order[:top]), self._summaries(order[::-1][:top])

    def offset(self) -> float | None:
        """How far r is from zero, in nats, on neutral tokens: those about equally common on both sides.

        The count-weighted mean over these tokens of the smaller of both sides' |mean r|, or of 0 if the means have
        different signs. None without such tokens.
        """
        total, weight = 0.0, 0
        for entry in self._frequent.values():
            if not _BALANCED[0] <= entry.share_chosen <= _BALANCED[1]:
                continue
            means = [
                statistics.fmean(r for r, s in zip(entry.ranked, entry.sides, strict=True) if s == side)
                for side in (0, 1)
            ]
            same_sign = means[0] * means[1] > 0
            total += len(entry.sides) * (min(map(abs, means)) if same_sign else 0.0)
            weight += len(entry.sides)
        return total / weight if weight else None

    def _summaries(self, ids: Sequence[int]) -> list[TokenSummary]:
        texts = self._split.weighter.tokenizer.labels(ids)
        return [self._summary(token_id, text) for token_id, text in zip(ids, texts, strict=True)]

    def _summary(self, token_id: int, text: str) -> TokenSummary:
        entry = self._occurrences[token_id]
        count = len(entry.sides)
        # Spread over the file, starting with the first occurrence.
        places = [entry.places[i * count // _EXAMPLES] for i in range(min(_EXAMPLES, count))]
        return TokenSummary(
            text=text,
            count=count,
            mean=statistics.fmean(entry.ranked),
            mean_weight=statistics.fmean(entry.weights),
            share_chosen=entry.share_chosen,
            examples=[self._example(*place) for place in places],
        )

    def _example(self, number: int, side: int, position: int) -> Example:
        pair = self._split.pairs[number]
        ids, tokenizer = pair.sides[side].known_ids, self._split.weighter.tokenizer
        before, after = ids[max(0, position - _CONTEXT) : position], ids[position + 1 : position + 1 + _CONTEXT]
        return Example(pair.pair.index, SIDES[side], _text(tokenizer, before), _text(tokenizer, after))


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return "".join(tokenizer.labels(ids))
