"""Pairs of a split as plain values, token by token, and which of them to show in which order."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from tisdpo_cli.data.messages import Message
from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.data.tokens import shared_characters
from tisdpo_cli.engine.inspection.results import PairView, ResponseFacts, Token, Turn
from tisdpo_cli.engine.inspection.weighted_pairs import InspectedPair, WeightedResponse
from tisdpo_cli.engine.inspection.weighted_split import WeightedSplit
from tisdpo_cli.errors import UsageError
from tisdpo_cli.method.recipe import Recipe, transform_scores
from tisdpo_cli.method.transforms import RandomStream, Side


def find_pair(split: WeightedSplit, index: int) -> int:
    """Position in the split of the pair with an index.

    Raises:
        UsageError: no pair has it.
    """
    indices = split.columns.indices.array()
    position = int(np.searchsorted(indices, index))
    if position == len(indices) or indices[position] != index:
        raise UsageError(f"no such pair; the {len(indices)} pairs are 0 to {indices[-1]}", where=f"--index {index}")
    return position


def sort_pairs(split: WeightedSplit, sort: str, seed: int) -> Sequence[int]:
    """Positions of all pairs of a split, in the requested order.

    Args:
        split: read with the `sort_key` of this order.
        sort: `spread`, `max-weight`, `min-mean`, `random` or `index`.
        seed: of the random order.
    """
    if sort == "random":
        positions = array("q", range(len(split)))
        random.Random(seed).shuffle(positions)
        return positions
    if sort == "index":
        return range(len(split))
    return array("q", np.argsort(-split.columns.keys.array(), kind="stable").tobytes())


def sort_key(sort: str, pair: InspectedPair, final: bool) -> float:
    """What pairs are sorted by, highest first; 0 for an order that has no such value.

    Args:
        sort: see `sort_pairs`.
        pair: with its weights.
        final: whether they are final weights.
    """
    if sort in ("random", "index"):
        return 0.0
    if sort == "max-weight":
        return max((float(side.weights.max()) for side in pair.sides if len(side.weights)), default=float("-inf"))
    if sort == "min-mean":
        return -min((float(side.weights.mean()) for side in pair.sides if len(side.weights)), default=float("inf"))
    # Scores vary around 0, final weights around 1.
    neutral = 1.0 if final else 0.0
    return sum(float((side.known - neutral).square().mean()) for side in pair.sides if len(side.known))


class PairViews(Sequence[PairView]):
    """Pairs of a split, each made when it is asked for."""

    def __init__(self, split: WeightedSplit, previews: Sequence[str], positions: Sequence[int]) -> None:
        """Choose pairs.

        Args:
            split: that holds the pairs.
            previews: names of the other recipes to show the weights of.
            positions: of the pairs in the split, in order.
        """
        self._split, self._previews, self._positions = split, previews, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, number: int) -> PairView: ...

    @overload
    def __getitem__(self, number: slice) -> PairViews: ...

    def __getitem__(self, number: int | slice) -> PairView | PairViews:
        if isinstance(number, slice):
            return PairViews(self._split, self._previews, self._positions[number])
        return pair_view(self._split, self._previews, self._positions[number])


def pair_view(split: WeightedSplit, previews: Sequence[str], position: int) -> PairView:
    """One pair, token by token.

    Args:
        split: that holds the pair.
        previews: names of the other recipes to show the weights of.
        position: of the pair in the split.
    """
    pair = split[position]
    conversation = pair.pair.conversation
    return PairView(
        index=pair.pair.index,
        where=pair.pair.row.where,
        prompt=pair.pair.prompt,
        turns=[] if conversation is None else list(map(_turn, conversation.prompt)),
        chosen=_tokens(split, pair, "chosen", pair.chosen),
        rejected=_tokens(split, pair, "rejected", pair.rejected),
        sides={side: _facts(response, split.final) for side, response in zip(SIDES, pair.sides, strict=True)},
        previews={
            name: {
                side: _weight_per_token(response)
                for side, response in zip(SIDES, split.under(name, pair).sides, strict=True)
            }
            for name in previews
        },
    )


def _turn(message: Message) -> Turn:
    functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
    calls = [f"calls {function['name']} {_arguments(function)}" for function in functions]
    return Turn(message["role"], "\n".join([*filter(None, [message.get("content")]), *calls]))


def _arguments(function: Mapping[str, Any]) -> str:
    """Arguments of a tool call as JSON; some datasets hold them as such."""
    value = function.get("arguments")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _facts(response: WeightedResponse, final: bool) -> ResponseFacts:
    return ResponseFacts(
        total_score=None if final else response.total,
        mean_weight=float(response.weights.mean()) if len(response.weights) else 0.0,
        share_clipped=float(response.clipped.float().mean()) if len(response.clipped) else 0.0,
        effective_sample_size=response.effective_size,
    )


def _tokens(split: WeightedSplit, pair: InspectedPair, side: Side, response: WeightedResponse) -> list[Token]:
    weighter = split.weighter
    ids = [*response.ids, *([response.stop] if response.has_eos else [])]
    texts, parts = weighter.tokenizer.pieces(ids), weighter.tokenizer.token_bytes(ids)
    groups = _character_groups(parts)
    stream = RandomStream(weighter.seed, pair.pair.index, side)
    scores = _value_per_token(response, response.known, response.scores.eos)
    adjusted = _value_per_token(response, response.adjusted, response.eos_adjusted)
    unclipped = _value_per_token(response, _unclipped(response, side, weighter.recipe, stream))
    clipped = _value_per_token(response, response.clipped)
    weights = _weight_per_token(response)
    tokens = []
    for i, token_id in enumerate(ids):
        group, character = groups.get(i, (None, ""))
        tokens.append(
            Token(
                position=i,
                id=token_id,
                text=texts[i],
                bytes=parts[i].hex(),
                kind="text" if i < len(response.ids) else "eos",
                character=character,
                group=group,
                logp_forward=response.logps["forward"][i] if response.logps else None,
                logp_reverse=response.logps["reverse"][i] if response.logps else None,
                score=None if split.final else scores[i],
                adjusted=None if split.final else adjusted[i],
                weight=weights[i],
                unclipped=weights[i] if unclipped[i] is None else unclipped[i],
                clipped=bool(clipped[i]),
                masked=weights[i] == 0,
                truncated=weights[i] is None,
            )
        )
    return tokens


def _character_groups(parts: Sequence[bytes]) -> dict[int, tuple[int, str]]:
    """Token position to the number and text of its group, for tokens that hold only some bytes of a character."""
    return {
        i: (number, text)
        for number, (begin, end, text) in enumerate(shared_characters(parts))
        for i in range(begin, end)
    }


def _weight_per_token(response: WeightedResponse) -> list[float | None]:
    """Weights of all tokens, None without a score, then of a weighted EOS."""
    weights = iter(response.weights.tolist())
    return [None if r is None else next(weights) for r in response.scores.tokens] + list(weights)


def _value_per_token(response: WeightedResponse, values: Tensor, eos: float | None = None) -> list[Any]:
    """Values [n] of the scored tokens as one value per token, None without a score, then that of the EOS."""
    known = iter(values.tolist())
    return [None if r is None else next(known) for r in response.scores.tokens] + [eos]


def _unclipped(response: WeightedResponse, side: Side, recipe: Recipe, stream: RandomStream) -> Tensor:
    """Weights [n] of the scored tokens without the clamp of the transform."""
    raw = transform_scores(response.adjusted, side, recipe, stream, clip=False)
    if recipe.normalize == "mean" and len(response.known):
        raw = raw / transform_scores(response.adjusted, side, recipe, stream).mean()
    # Weights that the clamp does not change stay identical to the last bit.
    return torch.where(response.clipped, raw, response.values("weights"))
