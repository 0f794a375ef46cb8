"""A split of a scored dataset with the weight of every token: the input of everything inspect-weights shows.

Knows files, tokenizers and token weights; it knows no settings and no views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tisdpo_cli.data.chat_tokens import ChatOptions, response_ids
from tisdpo_cli.data.dataset import Columns
from tisdpo_cli.data.locate import TRAIN, find_splits, named_split
from tisdpo_cli.data.pairs import Pair, read_pairs
from tisdpo_cli.data.rows import BadRow, handle_bad_rows
from tisdpo_cli.data.scored import (
    Logps,
    Scores,
    check_unchanged,
    read_logps,
    read_manifest,
    require_scores,
)
from tisdpo_cli.data.tokens import Vocabulary
from tisdpo_cli.engine.chat import ChatEncoder, vocabulary_of
from tisdpo_cli.engine.scoring.token_weights import (
    AT_START,
    TokenWeighter,
    fit_centers,
    known,
    token_weighter,
    weights_at_start,
)
from tisdpo_cli.errors import UsageError
from tisdpo_cli.method.recipe import Recipe, clipped
from tisdpo_cli.method.steps import Centers, Context
from tisdpo_cli.method.transforms import Side
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.model.tokenizer import load_tokenizer

_SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True)
class SplitOptions:
    """How a split of a scored dataset is read and weighted.

    Attributes:
        split: name of the split.
        columns: column names.
        on_bad_row: `error` or `skip`.
        parse_data: whether special tokens spelled out in data become these tokens.
        chat: how conversations are rendered.
        tokenizer: directory or hub id, or None for the tokenizer in the dataset directory.
        make_recipe: the recipe for a file with EOS scores (True) or without (False).
        centered: whether the recipe subtracts mean scores of the train split.
        final: whether the weight columns hold final weights.
        seed: of random transforms.
    """

    split: str
    columns: Columns
    on_bad_row: str
    parse_data: bool
    chat: ChatOptions
    tokenizer: str | None
    make_recipe: Callable[[bool], Recipe]
    centered: bool
    final: bool
    seed: int


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
class WeightedSplit:
    """Pairs with usable scores, the weighter behind their weights, and notices about the other rows."""

    pairs: list[InspectedPair]
    weighter: TokenWeighter
    notices: list[str]

    @property
    def final(self) -> bool:
        """Whether the weight columns hold final weights."""
        return self.weighter.recipe.final

    @property
    def responses(self) -> list[WeightedResponse]:
        """All responses."""
        return [response for pair in self.pairs for response in pair.sides]

    def side(self, number: int) -> list[WeightedResponse]:
        """Chosen (0) or rejected (1) responses."""
        return [pair.sides[number] for pair in self.pairs]

    def under(self, recipe: Recipe) -> WeightedSplit:
        """The same scores under another recipe with the same steps."""
        weighter = replace(self.weighter, recipe=recipe)
        pairs = []
        for inspected in self.pairs:
            chosen, rejected = (
                _reweighted(inspected.pair.index, side, response, weighter)
                for side, response in zip(_SIDES, inspected.sides, strict=True)
            )
            pairs.append(InspectedPair(inspected.pair, chosen, rejected))
        return WeightedSplit(pairs, weighter, [])


def _reweighted(index: int, side: Side, response: WeightedResponse, weighter: TokenWeighter) -> WeightedResponse:
    weights = weighter.weights(response.scores, len(response.known), response.has_eos, index, side, response.context)
    return replace(response, weights=weights, clipped=clipped(response.adjusted, side, weighter.recipe))


def read_weighted_split(scored: str, options: SplitOptions) -> WeightedSplit:
    """Read a split of a scored dataset and compute the weight of every token.

    Args:
        scored: path or hub id of the dataset.
        options: how to read and weight it.

    Raises:
        TisdpoError: the dataset is not scored, does not fit its tokenizer, or has no such split.
    """
    files = find_splits(scored)
    file = named_split(files, options.split, scored, "--split")
    read = read_pairs(file, options.columns, options.on_bad_row)
    require_scores((pair.row for pair in read.pairs), scored, options.final)
    manifest = read_manifest(Path(scored).expanduser()) or {}
    changed = check_unchanged(manifest, file, options.final)
    tokenizer = load_tokenizer(_tokenizer_path(options.tokenizer, scored), parse_data=options.parse_data)
    at_start = not manifest and weights_at_start(tokenizer, read.pairs)
    chat = ChatEncoder(tokenizer, options.chat)
    vocabulary = vocabulary_of(tokenizer, chat, at_start)
    centers = _centers(options, files[TRAIN], vocabulary) if options.centered else None
    weighter = token_weighter(options.make_recipe, options.seed, tokenizer, read.pairs, centers, at_start)
    encoded = _encoded(read.pairs, vocabulary)
    chat.check(manifest.get("chat"), scored)
    contexts = weighter.contexts_of_pairs(read.pairs, chat)
    pairs, bad = _weighted_pairs(read.pairs, encoded, contexts, weighter)
    skipped = handle_bad_rows(bad, len(read.pairs), options.on_bad_row)
    # Editing scores is legitimate and needs no warning; a file of final weights may still hold scores.
    warnings = [*([changed] if changed and options.final else []), *([AT_START] if at_start else [])]
    return WeightedSplit(pairs, weighter, [*read.notices, *warnings, *skipped])


def _centers(options: SplitOptions, train: Path, vocabulary: Vocabulary) -> Centers:
    """The means that training subtracts: those of the train split, whatever split is shown."""
    pairs = read_pairs(train, options.columns, options.on_bad_row).pairs
    encoded = _encoded(pairs, vocabulary)
    return fit_centers(pairs, [(len(chosen), len(rejected)) for (chosen, rejected), _ in encoded])


def _encoded(pairs: Sequence[Pair], vocabulary: Vocabulary) -> list[tuple[tuple[list[int], ...], int]]:
    """Ids of both untruncated responses of each pair, without what ends them, and the id that does."""
    conversations = [pair.conversation for pair in pairs if pair.conversation is not None]
    if conversations:
        return response_ids(conversations, [pair.row.where for pair in pairs], vocabulary.chat)
    both = (vocabulary.responses([getattr(pair, side) for pair in pairs]) for side in _SIDES)
    return [(ids, vocabulary.eos) for ids in zip(*both, strict=True)]


def _tokenizer_path(tokenizer: str | None, scored: str) -> Path:
    if tokenizer is not None:
        path = Path(tokenizer).expanduser()
        return path if (path / "tokenizer_config.json").is_file() else locate_model(tokenizer, "--tokenizer")
    dataset = Path(scored).expanduser()
    folder = dataset if dataset.is_dir() else dataset.parent
    if not (folder / "tokenizer_config.json").is_file():
        raise UsageError("no tokenizer in the dataset directory", where=scored, fix="pass --tokenizer PATH")
    return folder


def _weighted_pairs(
    pairs: Sequence[Pair],
    encoded: Sequence[tuple[tuple[list[int], ...], int]],
    contexts: Sequence[tuple[Context, Context]],
    weighter: TokenWeighter,
) -> tuple[list[InspectedPair], list[BadRow]]:
    """The pairs with usable scores, and a bad row for each other pair."""
    weighted: list[InspectedPair] = []
    bad: list[BadRow] = []
    for pair, both, (ids, stop) in zip(pairs, contexts, encoded, strict=True):
        responses = [
            _weighted(pair, side, side_ids, stop, weighter, context)
            for side, side_ids, context in zip(_SIDES, ids, both, strict=True)
        ]
        usable = [response for response in responses if isinstance(response, WeightedResponse)]
        if len(usable) == len(_SIDES):
            weighted.append(InspectedPair(pair, usable[0], usable[1]))
        else:
            bad.append(next(response for response in responses if isinstance(response, BadRow)))
    return weighted, bad


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
