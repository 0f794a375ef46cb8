"""From the scores of a dataset to token weights: read, check, fit and transform, for train and inspect-weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tisdpo_cli.data.chat_tokens import response_ids
from tisdpo_cli.data.pairs import Pair
from tisdpo_cli.data.rows import BadRow, batches
from tisdpo_cli.data.scored import (
    EOS_COLUMNS,
    SIDES,
    Scores,
    has_eos_scores,
    missing_eos_column,
    read_scores,
    weight_count,
)
from tisdpo_cli.data.stored_pairs import holds_conversations, rows_with
from tisdpo_cli.data.vocabulary import EncodeChat
from tisdpo_cli.method.recipe import Recipe, response_weights
from tisdpo_cli.method.steps import Centers, Context, apply_steps, centers_of, spans_of
from tisdpo_cli.method.transforms import RandomStream, Side
from tisdpo_cli.model.tokenizer import Tokenizer

# Pairs that are tokenized together.
PAIRS_AT_ONCE = 256


@dataclass(frozen=True)
class TokenWeighter:
    """How the scores of a split become weights.

    Attributes:
        recipe: steps, transform, normalization and EOS weight.
        seed: of random transforms.
        tokenizer: the one that the scores belong to.
        centers: means of the train split, if the recipe centers.
        eos_scores: whether the file has EOS scores, which makes rows without them bad rows.
        at_start: whether the scores belong to responses encoded as at the start of a text.
    """

    recipe: Recipe
    seed: int
    tokenizer: Tokenizer
    centers: Centers | None = None
    eos_scores: bool = False
    at_start: bool = False

    def contexts(self, texts: Sequence[str]) -> list[Context]:
        """What the steps need to know about each response besides its scores."""
        unit = self.recipe.steps.get("spans")
        if unit is None:
            return [Context(self.centers)] * len(texts)
        offsets = self.tokenizer.offsets(texts, self.at_start)
        spans = (spans_of(text, at, str(unit)) for text, at in zip(texts, offsets, strict=True))
        return [Context(self.centers, span_ids) for span_ids in spans]

    def contexts_of_pairs(self, pairs: Sequence[Pair], chat: EncodeChat) -> list[tuple[Context, Context]]:
        """The same for both responses of each pair.

        Args:
            pairs: of texts or of conversations.
            chat: encodes conversations.
        """
        unit = self.recipe.steps.get("spans")
        conversations = [pair.conversation for pair in pairs if pair.conversation is not None]
        if unit is None or not conversations:
            chosen, rejected = (self.contexts([getattr(pair, side) for pair in pairs]) for side in SIDES)
            return list(zip(chosen, rejected, strict=True))
        contexts = []
        for answers, _ in response_ids(conversations, [pair.row.where for pair in pairs], chat):
            spelled = map(self.tokenizer.spelled, answers)
            first, second = (Context(self.centers, spans_of(text, at, str(unit))) for text, at in spelled)
            contexts.append((first, second))
        return contexts

    def read(self, pair: Pair, side: str, tokens: int, shown: str) -> Scores | BadRow:
        """The checked scores of a response with this many tokens; see `read_scores`."""
        scores = read_scores(pair.row, side, tokens, shown, self.recipe.final)
        if isinstance(scores, BadRow) or not self.eos_scores or self.recipe.eos_weight != "score":
            return scores
        return missing_eos_column(pair.row, side) or scores

    def weights(self, scores: Scores, kept: int, has_eos: bool, index: int, side: Side, context: Context) -> Tensor:
        """Weights [kept + EOS] float32 of a response, whose pair has this index in its split."""
        eos = None if scores.eos is None else torch.tensor([scores.eos], dtype=torch.float32)
        stream = RandomStream(self.seed, index, side)
        return response_weights(known(scores), eos, kept, has_eos, self.recipe, stream, context)

    def fault(self, weights: Tensor) -> str | None:
        """Why weights are unusable because float32 cannot hold them, or None."""
        non_finite = weights[~weights.isfinite()].tolist()
        if not non_finite:
            return None
        return f"{self.recipe.describe()} gives the weight {non_finite[0]}; choose parameters closer to the defaults"

    def adjusted(self, scores: Scores, context: Context) -> Tensor:
        """Scores after the steps: of the scored tokens, then of the EOS as one more token if it has a score."""
        eos = [] if scores.eos is None else [scores.eos]
        return apply_steps(torch.cat([known(scores), torch.tensor(eos)]), self.recipe.steps, context)


def known(scores: Scores) -> Tensor:
    """The scores that are not null, as a tensor [n] float32."""
    return torch.tensor(scores.known, dtype=torch.float32)


def token_weighter(
    make_recipe: Callable[[bool], Recipe],
    seed: int,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    centers: Centers | None,
    at_start: bool = False,
) -> TokenWeighter:
    """How the scores of these pairs become weights.

    Args:
        make_recipe: gives the recipe for a file that does or does not hold EOS scores.
        seed: of random transforms.
        tokenizer: the one that the scores belong to.
        pairs: of the split.
        centers: means of the train split, where the recipe centers.
        at_start: see `TokenWeighter`.
    """
    eos_scores = has_eos_scores(rows_with(pairs, EOS_COLUMNS))
    return TokenWeighter(make_recipe(eos_scores), seed, tokenizer, centers, eos_scores, at_start)


AT_START = (
    "the weights fit responses encoded with a space in front, as the authors' code does; they are encoded so here too"
)


def weights_at_start(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> bool:
    """Whether weights of unknown origin fit only responses that are encoded as at the start of a text.

    The authors' code encodes responses so, which for some tokenizers gives another number of tokens.
    """
    if not tokenizer.texts.adds_space or holds_conversations(pairs):
        return False

    def fit(at_start: bool) -> bool:
        for batch in batches(pairs, PAIRS_AT_ONCE):
            for side in SIDES:
                encoded = tokenizer.encode_responses([getattr(pair, side) for pair in batch], at_start)
                if any(weight_count(pair.row, side) != len(ids) for pair, ids in zip(batch, encoded, strict=True)):
                    return False
        return True

    return not fit(at_start=False) and fit(at_start=True)


class WeightTotals:
    """What is counted over the weights of a split, for warnings."""

    def __init__(self) -> None:
        self._any = False
        self._sum, self._count = 0.0, 0

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Count the weights of a pair."""
        self._any = self._any or bool(chosen.any()) or bool(rejected.any())
        self._sum += float(chosen.double().sum())
        self._count += len(chosen)

    def warnings(self, final: bool) -> list[str]:
        """Warnings for the user; about the sign, if the file holds final weights."""
        if not self._any:
            return ["all weights are 0; nothing will be learned"]
        mean = self._sum / self._count if final else 1.0
        if mean > 0:
            return []
        return [f"the mean weight of chosen responses is {mean:.4g}; if these columns hold scores, the sign is wrong"]


def fit_centers(pairs: Iterable[Pair], tokens: Iterable[tuple[int, int]]) -> Centers:
    """The mean scores of a train split, for the step `center`; rows without usable scores are left out.

    Args:
        pairs: of the train split.
        tokens: the number of tokens of both uncut responses of each pair.
    """

    def responses() -> Iterator[list[float]]:
        for pair, counts in zip(pairs, tokens, strict=True):
            both = [read_scores(pair.row, side, count, "") for side, count in zip(SIDES, counts, strict=True)]
            yield from (scores.known for scores in both if isinstance(scores, Scores))

    return centers_of(responses())
