"""The first row of a training as plain values: which tokens are read, which are scored, and what ends a response.

Knows no terminal; a dry run shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tisdpo_cli.engine.training.pair_task import WeightedPair
from tisdpo_cli.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tisdpo_cli.data.stored_examples import EncodedExample


@dataclass(frozen=True)
class RowToken:
    """One token, whether the loss includes it, and its weight where tokens are weighted."""

    id: int
    text: str
    scored: bool
    weight: float | None = None


@dataclass(frozen=True)
class RowResponse:
    """One response.

    Attributes:
        side: `chosen` or `rejected` as in the metrics; `response` in train-sft.
        tokens: after truncation, with the stop if the response was not truncated.
        whole: number of tokens before truncation, with the stop.
        stop: the token that ends the response, or None if it was truncated.
    """

    side: str
    tokens: list[RowToken]
    whole: int
    stop: RowToken | None

    @property
    def scored(self) -> int:
        """Number of tokens in the loss."""
        return sum(token.scored for token in self.tokens)


@dataclass(frozen=True)
class FirstRow:
    """The first row as it is trained.

    Attributes:
        where: file and line.
        prompt: tokens of the prompt after truncation, which are not in the loss.
        opening: number of tokens at the end of the prompt that the chat template writes before every answer.
        swapped: whether `chosen` is the dataset's rejected response.
    """

    where: str
    prompt: list[RowToken]
    opening: int
    responses: list[RowResponse]
    swapped: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def of_pair(pair: WeightedPair, tokenizer: Tokenizer, swapped: bool) -> FirstRow:
    """A pair as it is trained; tokens of weight 0 are not scored."""
    tokens, responses = pair.tokens, []
    for k, (side, response) in enumerate((("chosen", tokens.chosen), ("rejected", tokens.rejected))):
        weights = None if pair.weights is None else pair.weights[k].tolist()
        shown = _tokens(response.ids, tokenizer, weights)
        responses.append(RowResponse(side, shown, response.uncut + 1, shown[-1] if response.has_eos else None))
    return FirstRow(tokens.where, _context(tokens.prompt, tokenizer), tokens.opening, responses, swapped)


def of_example(example: EncodedExample, tokenizer: Tokenizer) -> FirstRow:
    """An example of train-sft; all tokens to learn are scored."""
    learned, given = example.learned, example.given
    shown = _tokens(learned, tokenizer, None)
    response = RowResponse("response", shown, len(learned) + example.left_out, shown[-1] if example.has_end else None)
    return FirstRow(example.where, _context(given, tokenizer), example.opening, [response])


def _tokens(ids: Sequence[int], tokenizer: Tokenizer, weights: Sequence[float] | None) -> list[RowToken]:
    """Tokens, scored unless their weight is 0."""
    known = [None] * len(ids) if weights is None else weights
    pieces = tokenizer.labels(ids)
    return [RowToken(i, text, weight != 0, weight) for i, text, weight in zip(ids, pieces, known, strict=True)]


def _context(ids: Sequence[int], tokenizer: Tokenizer) -> list[RowToken]:
    """Tokens of a prompt, none of them scored."""
    return [RowToken(i, text, False) for i, text in zip(ids, tokenizer.labels(ids), strict=True)]
