"""Scores of a dataset become token weights: read, checked, fitted and weighed, for train and inspect-weights alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tisdpo_cli.data.pairs import Pair
from tisdpo_cli.data.rows import BadRow
from tisdpo_cli.data.scored import SIDES, Scores, has_eos_scores, missing_eos_column, read_scores
from tisdpo_cli.method.recipe import Recipe, response_weights
from tisdpo_cli.method.steps import Centers, Context, apply_steps, centers_of, spans_of
from tisdpo_cli.method.transforms import RandomStream, Side
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.settings.groups import Weights


@dataclass(frozen=True)
class TokenWeighter:
    """How the scores of a split become weights.

    Attributes:
        recipe: steps, transform and what follows.
        seed: of transforms that draw.
        tokenizer: the one that the scores belong to.
        centers: means of the train split, where the recipe centres.
        eos_scores: whether the file has EOS scores, so that rows without a column for them are bad rows.
    """

    recipe: Recipe
    seed: int
    tokenizer: Tokenizer
    centers: Centers | None = None
    eos_scores: bool = False

    def contexts(self, texts: Sequence[str]) -> list[Context]:
        """What the steps need of responses beside their scores, in order."""
        unit = self.recipe.steps.get("spans")
        if unit is None:
            return [Context(self.centers)] * len(texts)
        offsets = self.tokenizer.offsets(texts)
        spans = (spans_of(text, at, str(unit)) for text, at in zip(texts, offsets, strict=True))
        return [Context(self.centers, some) for some in spans]

    def contexts_of_pairs(self, pairs: Sequence[Pair]) -> list[tuple[Context, Context]]:
        """The same for both responses of each pair."""
        chosen, rejected = (self.contexts([getattr(pair, side) for pair in pairs]) for side in SIDES)
        return list(zip(chosen, rejected, strict=True))

    def read(self, pair: Pair, side: str, tokens: int, shown: str) -> Scores | BadRow:
        """The checked scores of a response of so many tokens; see `read_scores`."""
        found = read_scores(pair.row, side, tokens, shown, self.recipe.final)
        if isinstance(found, BadRow) or not self.eos_scores or self.recipe.eos_weight != "score":
            return found
        return missing_eos_column(pair.row, side) or found

    def weights(self, scores: Scores, kept: int, has_eos: bool, index: int, side: Side, context: Context) -> Tensor:
        """Weights [kept + EOS] float32 of a response, whose pair has this index in its split."""
        eos = None if scores.eos is None else torch.tensor([scores.eos], dtype=torch.float32)
        stream = RandomStream(self.seed, index, side)
        return response_weights(known(scores), eos, kept, has_eos, self.recipe, stream, context)

    def fault(self, weights: Tensor) -> str | None:
        """What is wrong with weights that float32 cannot hold, or None."""
        beyond = weights[~weights.isfinite()].tolist()
        if not beyond:
            return None
        return (
            f"{beyond[0]} is no weight, as made by {self.recipe.describe()}: choose parameters nearer to the defaults"
        )

    def adjusted(self, scores: Scores, context: Context) -> Tensor:
        """Scores after the steps: of the tokens that have one, and of the EOS, one more token, where it has one."""
        eos = [] if scores.eos is None else [scores.eos]
        return apply_steps(torch.cat([known(scores), torch.tensor(eos)]), self.recipe.steps, context)


def known(scores: Scores) -> Tensor:
    """The scores that there are, as a tensor [n] float32."""
    return torch.tensor(scores.known, dtype=torch.float32)


def token_weighter(
    settings: Weights, seed: int, tokenizer: Tokenizer, pairs: Sequence[Pair], centers: Centers | None
) -> TokenWeighter:
    """How the scores of these pairs become weights; the EOS by its score where the file has it."""
    eos_scores = has_eos_scores(pair.row for pair in pairs)
    return TokenWeighter(settings.recipe(eos_scores), seed, tokenizer, centers, eos_scores)


def weight_warnings(chosen: Sequence[Tensor], rejected: Sequence[Tensor], final: bool) -> list[str]:
    """What to look at before a training with these weights of all chosen and all rejected responses."""
    if not any(weights.any() for weights in (*chosen, *rejected)):
        return ["all weights are 0: nothing will be learned"]
    mean = float(torch.cat(list(chosen)).double().mean()) if final else 1.0
    if mean > 0:
        return []
    return [f"the mean weight of the chosen responses is {mean:.4g}: if these columns are scores, the sign is wrong"]


def fit_centers(settings: Weights, pairs: Sequence[Pair], tokens: Sequence[tuple[int, int]]) -> Centers | None:
    """The mean scores of a train split, where the settings centre; rows that cannot be used are left out.

    Args:
        settings: how weights are made.
        pairs: of the train split.
        tokens: tokens of both uncut responses of each pair.
    """
    if "center" not in settings.steps():
        return None

    def responses() -> Iterator[list[float]]:
        for pair, counts in zip(pairs, tokens, strict=True):
            both = [read_scores(pair.row, side, count, "") for side, count in zip(SIDES, counts, strict=True)]
            yield from (scores.known for scores in both if isinstance(scores, Scores))

    return centers_of(responses())
