"""One pair with the weight of every token: the scores of a row, read, checked and transformed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tisdpo_cli.data.chat_tokens import response_ids
from tisdpo_cli.data.pairs import Pair
from tisdpo_cli.data.rows import BadRow, batches
from tisdpo_cli.data.scored import Logps, Scores, read_logps
from tisdpo_cli.data.tokens import Vocabulary
from tisdpo_cli.engine.chat import ChatEncoder
from tisdpo_cli.engine.scoring.token_weights import PAIRS_AT_ONCE, TokenWeighter, known
from tisdpo_cli.method.recipe import Recipe, clipped
from tisdpo_cli.method.steps import Context
from tisdpo_cli.method.transforms import Side

_SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True)
class WeightedResponse:
    """One response with scores and weights; the scored tokens are those whose score is not null.

    For final weights, scores and weights are the same.

    Attributes:
        ids: token ids of the uncut response, without the EOS.
        scores: as read, null scores included.
        logps: under both contrastive models, if the dataset stores them.
        known: [n] r of the scored tokens.
        adjusted: [n] r after the steps.
        weights: [n] or [n + 1], ending with the EOS if it is weighted.
        clipped: [n] whether the transform clamps the adjusted score.
        eos_adjusted: score of the EOS after the steps, or None.
        context: what the steps need to know about the response besides its scores.
        stop: id that ends the response.
    """

    ids: list[int]
    scores: Scores
    logps: Logps | None
    known: Tensor
    adjusted: Tensor
    weights: Tensor
    clipped: Tensor
    eos_adjusted: float | None
    context: Context
    stop: int

    @property
    def has_eos(self) -> bool:
        """Whether the EOS has a weight."""
        return self.weights.numel() > self.known.numel()

    @property
    def scored(self) -> Tensor:
        """Scores aligned with `weights`: of the scored tokens, then of a weighted EOS."""
        eos = 0.0 if self.scores.eos is None else self.scores.eos
        return torch.cat([self.known, torch.full((int(self.has_eos),), eos)])

    @property
    def known_ids(self) -> list[int]:
        """Ids of the scored tokens."""
        return [token_id for token_id, r in zip(self.ids, self.scores.tokens, strict=True) if r is not None]

    @property
    def total(self) -> float:
        """Σ r, including a scored EOS."""
        return float(self.known.sum()) + (self.scores.eos or 0.0)

    @property
    def effective_size(self) -> float:
        """(Σw)² / (n Σw²): 1 if all weights are equal, 0 without weights."""
        squares = float(self.weights.square().sum()) * len(self.weights)
        return float(self.weights.sum()) ** 2 / squares if squares else 0.0

    def values(self, show: str) -> Tensor:
        """`scores`, `adjusted` or `weights` [n] of the scored tokens, without the EOS."""
        return {"scores": self.known, "adjusted": self.adjusted, "weights": self.weights[: len(self.known)]}[show]


@dataclass(frozen=True)
class InspectedPair:
    """Both responses of a pair."""

    pair: Pair
    chosen: WeightedResponse
    rejected: WeightedResponse

    @property
    def sides(self) -> tuple[WeightedResponse, WeightedResponse]:
        """Chosen, then rejected."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class PairWeighter:
    """Turns pairs into pairs with weights.

    Attributes:
        weighter: how scores become weights.
        vocabulary: tokenizer.
        chat: encodes conversations.
    """

    weighter: TokenWeighter
    vocabulary: Vocabulary
    chat: ChatEncoder

    def weigh(self, pairs: Iterable[Pair]) -> Iterator[InspectedPair | BadRow]:
        """The pairs with weights, and a bad row in the place of each pair without usable scores.

        Raises:
            DataError: the chat template cannot show a conversation.
        """
        for batch in batches(pairs, PAIRS_AT_ONCE):
            encoded = encoded_responses(batch, self.vocabulary)
            contexts = self.weighter.contexts_of_pairs(batch, self.chat)
            for pair, both, (ids, stop) in zip(batch, contexts, encoded, strict=True):
                yield self._pair(pair, ids, stop, both)

    def _pair(
        self, pair: Pair, ids: tuple[list[int], ...], stop: int, contexts: tuple[Context, Context]
    ) -> InspectedPair | BadRow:
        responses = []
        for side, side_ids, context in zip(_SIDES, ids, contexts, strict=True):
            response = _weighted(pair, side, side_ids, stop, self.weighter, context)
            if isinstance(response, BadRow):
                return response
            responses.append(response)
        return InspectedPair(pair, responses[0], responses[1])

    def under(self, recipe: Recipe, inspected: InspectedPair) -> InspectedPair:
        """A pair with the same scores under another recipe with the same steps."""
        weighter = replace(self.weighter, recipe=recipe)
        chosen, rejected = (
            _reweighted(inspected.pair.index, side, response, weighter)
            for side, response in zip(_SIDES, inspected.sides, strict=True)
        )
        return InspectedPair(inspected.pair, chosen, rejected)


def encoded_responses(pairs: Sequence[Pair], vocabulary: Vocabulary) -> list[tuple[tuple[list[int], ...], int]]:
    """Ids of both untruncated responses of each pair, without what ends them, and the id that does."""
    conversations = [pair.conversation for pair in pairs if pair.conversation is not None]
    if conversations:
        return response_ids(conversations, [pair.row.where for pair in pairs], vocabulary.chat)
    both = (vocabulary.responses([getattr(pair, side) for pair in pairs]) for side in _SIDES)
    return [(ids, vocabulary.eos) for ids in zip(*both, strict=True)]


def _reweighted(index: int, side: Side, response: WeightedResponse, weighter: TokenWeighter) -> WeightedResponse:
    weights = weighter.weights(response.scores, len(response.known), response.has_eos, index, side, response.context)
    return replace(response, weights=weights, clipped=clipped(response.adjusted, side, weighter.recipe))


def _weighted(
    pair: Pair, side: Side, ids: list[int], stop: int, weighter: TokenWeighter, context: Context
) -> WeightedResponse | BadRow:
    scores = weighter.read(pair, side, len(ids), "the tokenizer in use")
    logps = read_logps(pair.row, side, len(ids))
    if isinstance(scores, BadRow):
        return scores
    if isinstance(logps, BadRow):
        return logps
    values, stepped = known(scores), weighter.adjusted(scores, context)
    adjusted, eos_adjusted = stepped[: len(values)], stepped[len(values) :].tolist()
    has_eos = len(values) == len(ids) and (scores.eos is not None or weighter.recipe.eos_weight != "score")
    weights = weighter.weights(scores, len(values), has_eos, pair.index, side, context)
    fault = weighter.fault(weights)
    if fault:
        return BadRow(pair.row.where, f"{side}: {fault}")
    return WeightedResponse(
        ids=ids,
        scores=scores,
        logps=logps,
        known=values,
        adjusted=adjusted,
        weights=weights,
        clipped=clipped(adjusted, side, weighter.recipe),
        eos_adjusted=eos_adjusted[0] if eos_adjusted else None,
        context=context,
        stop=stop,
    )
