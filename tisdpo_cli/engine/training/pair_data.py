"""The pairs of a training: read, truncated and weighted."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tisdpo_cli.data.dataset import DatasetSplit
from tisdpo_cli.data.rows import BadRow, batches, handle_bad_rows
from tisdpo_cli.data.scored import (
    WEIGHT_COLUMNS,
    check_unchanged,
    has_weights,
    missing_score,
    read_manifest,
    require_scores,
)
from tisdpo_cli.data.splits import ReadOptions, Split, drop_untrainable, pairs_behind, read_split
from tisdpo_cli.data.stored_pairs import Pair, rows_with
from tisdpo_cli.data.stored_tokens import pair_lengths, select_pairs, swapped_pairs, uncut_lengths
from tisdpo_cli.data.tokens import EncodedPair, Response
from tisdpo_cli.engine.chat import ChatEncoder, vocabulary_of
from tisdpo_cli.engine.scoring.token_weights import (
    AT_START,
    PAIRS_AT_ONCE,
    TokenWeighter,
    WeightTotals,
    fit_centers,
    token_weighter,
    weights_at_start,
)
from tisdpo_cli.engine.training.float_pairs import FloatPairs, FloatWriter
from tisdpo_cli.engine.training.weighted_pairs import WeightedPairs
from tisdpo_cli.errors import DataError
from tisdpo_cli.method.recipe import Recipe
from tisdpo_cli.method.steps import Centers, Context
from tisdpo_cli.method.transforms import Side
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.reporter import Reporter


@dataclass(frozen=True)
class Weighting:
    """How the scores of a dataset become token weights.

    Attributes:
        make_recipe: gives the recipe for a file that does or does not hold EOS scores.
        centered: whether the recipe subtracts mean scores of the train split.
        final: whether the columns hold final weights rather than scores.
        eos_is_auto: whether the file decides how the EOS is weighted.
        seed: of random transforms.
    """

    make_recipe: Callable[[bool], Recipe]
    centered: bool
    final: bool
    eos_is_auto: bool
    seed: int


@dataclass(frozen=True)
class PairSource:
    """Where the pairs of a training come from.

    Attributes:
        dataset: what the user calls the dataset.
        splits: `train` and perhaps `test`.
        eval_pairs: test pairs to evaluate, at most.
        swapped: whether chosen and rejected are swapped.
        weighting: how tokens are weighted, or None for unit weights.
    """

    dataset: str
    splits: Mapping[str, DatasetSplit]
    options: ReadOptions
    eval_pairs: int
    swapped: bool
    weighting: Weighting | None


@dataclass(frozen=True)
class _Scored:
    """What the weights of all splits share.

    Attributes:
        manifest: `estimate.json` of the dataset, or None if it has none.
        tokenizer: the one that the scores must belong to.
        chat: encodes conversations.
        centers: means of the train split, if the recipe centers.
        at_start: see `TokenWeighter`.
    """

    manifest: dict[str, Any] | None
    tokenizer: Tokenizer
    chat: ChatEncoder
    centers: Centers | None
    at_start: bool


def prepare_pairs(source: PairSource, tokenizer: Tokenizer, reporter: Reporter) -> tuple[WeightedPairs, WeightedPairs]:
    """The pairs to train, and those to evaluate.

    Raises:
        DataError: rows or weights are unusable, or no pair is left.
    """
    for notice in tokenizer.notices:
        reporter.note(notice)
    chat, scored = ChatEncoder(tokenizer, source.options.chat), None
    vocabulary = vocabulary_of(tokenizer, chat)
    train = read_split(source.splits["train"], source.options, vocabulary)
    if source.weighting is not None:
        manifest = read_manifest(Path(source.dataset).expanduser())
        at_start = manifest is None and weights_at_start(tokenizer, train.pairs)
        if at_start:
            reporter.note(AT_START)
            vocabulary = vocabulary_of(tokenizer, chat, at_start)
            train = read_split(source.splits["train"], source.options, vocabulary)
        scored = _Scored(manifest, tokenizer, chat, _centers(source.weighting, train, reporter), at_start)
    elif has_weights(rows_with(train.pairs, WEIGHT_COLUMNS)):
        reporter.note("ignoring the token weights in this dataset; use `tisdpo train` to train with them")
    splits = [train]
    if "test" in source.splits and source.eval_pairs:
        splits.append(read_split(source.splits["test"], source.options, vocabulary, source.eval_pairs))
    for notice in chat.notices():
        reporter.note(notice)
    if scored is not None and scored.manifest is not None:
        chat.check(scored.manifest.get("chat"), source.dataset)
    pairs = [_split_pairs(source, split, scored, reporter) for split in splits]
    return pairs[0], pairs[1] if len(pairs) > 1 else WeightedPairs([])


def _centers(weighting: Weighting, train: Split, reporter: Reporter) -> Centers | None:
    idle_steps = weighting.make_recipe(True).idle_steps()
    if idle_steps:
        reporter.warn(idle_steps)
    if not weighting.centered:
        return None
    return fit_centers(train.pairs, uncut_lengths(train.encoded))


def _split_pairs(source: PairSource, split: Split, scored: _Scored | None, reporter: Reporter) -> WeightedPairs:
    kept, dropped = drop_untrainable(split)
    for warning in split.warnings:
        reporter.warn(warning)
    for notice in (*split.notices, *dropped):
        reporter.note(notice)
    if source.weighting is None or scored is None:
        return WeightedPairs(swapped_pairs(kept) if source.swapped else kept, sizes=split.sizes)
    _check_scored(source, source.weighting, split, scored, reporter)
    return _weighted_pairs(source, source.weighting, split, kept, scored, reporter)


def _weighted_pairs(
    source: PairSource,
    weighting: Weighting,
    split: Split,
    kept: Sequence[EncodedPair],
    scored: _Scored,
    reporter: Reporter,
) -> WeightedPairs:
    rows = pairs_behind(split, kept)
    weighter = token_weighter(
        weighting.make_recipe, weighting.seed, scored.tokenizer, rows, scored.centers, scored.at_start
    )
    recipe, total = weighter.recipe, WeightTotals()
    reporter.note(f"{split.source.name}: weights by {recipe.describe()}{_eos_reason(weighting, recipe)}")
    written, usable = FloatWriter(), array("q")
    bad: list[BadRow] = []
    for number, (pair, row, contexts) in enumerate(_with_contexts(kept, rows, weighter, scored.chat)):
        weights = _weigh(pair, row, weighter, contexts)
        if isinstance(weights, BadRow):
            bad.append(weights)
            continue
        usable.append(number)
        total.add(*weights)
        for side in weights:
            written.append(side)
    for line in handle_bad_rows(bad, len(kept), source.options.on_bad_row):
        reporter.warn(line)
    for line in total.warnings(recipe.final):
        reporter.warn(f"{split.source.name}: {line}")
    tokens = select_pairs(kept, np.frombuffer(usable, np.int64)) if bad else kept
    floats = FloatPairs(written.values(), pair_lengths(tokens)[:, 1:])
    return WeightedPairs(tokens, floats, sizes=split.sizes)


def _with_contexts(
    kept: Sequence[EncodedPair], rows: Sequence[Pair], weighter: TokenWeighter, chat: ChatEncoder
) -> Iterator[tuple[EncodedPair, Pair, tuple[Context, Context]]]:
    for block in batches(zip(kept, rows, strict=True), PAIRS_AT_ONCE):
        contexts = weighter.contexts_of_pairs([row for _, row in block], chat)
        yield from ((pair, row, both) for (pair, row), both in zip(block, contexts, strict=True))


def _check_scored(source: PairSource, weighting: Weighting, split: Split, scored: _Scored, reporter: Reporter) -> None:
    """Check that the file holds scores (or weights) for the tokenizer.

    Raises:
        DataError: it has none, or they belong to another tokenizer.
    """
    require_scores(rows_with(split.pairs, WEIGHT_COLUMNS), split.source.where, weighting.final)
    manifest = scored.manifest
    if manifest is None:
        return
    if manifest.get("tokenizer") != scored.tokenizer.digest:
        raise DataError(
            "scored with a different tokenizer than this model's",
            where=source.dataset,
            fix="score it again with models that share the tokenizer",
        )
    changed = check_unchanged(manifest, split.source.paths[0], weighting.final)
    if changed:
        (reporter.warn if weighting.final else reporter.note)(changed)


def _eos_reason(weighting: Weighting, recipe: Recipe) -> str:
    if not weighting.eos_is_auto:
        return ""
    kind = "weights" if recipe.final else "scores"
    return f" (auto: the file has {'' if recipe.eos_weight == 'score' else 'no '}EOS {kind})"


_FIX_MISSING = {
    False: "truncated in `estimate`: use the --max-length and --max-prompt-length in estimate.json, or score with "
    "these; for the EOS, set --eos-weight zero or one",
    True: "give every trained token a weight; for the EOS, set --eos-weight zero or one",
}


def _weigh(
    pair: EncodedPair, row: Pair, weighter: TokenWeighter, contexts: tuple[Context, Context]
) -> tuple[Tensor, Tensor] | BadRow:
    final = weighter.recipe.final
    weights = []
    sides: tuple[tuple[Side, Response], ...] = (("chosen", pair.chosen), ("rejected", pair.rejected))
    for (side, response), context in zip(sides, contexts, strict=True):
        scores = weighter.read(row, side, response.uncut, "this model's tokenizer")
        if isinstance(scores, BadRow):
            return scores
        needs_eos = response.has_eos and weighter.recipe.eos_weight == "score"
        missing = missing_score(scores, response.kept, needs_eos, final)
        if missing:
            return BadRow(pair.where, f"{side}: {missing}; {_FIX_MISSING[final]}")
        weights.append(weighter.weights(scores, response.kept, response.has_eos, pair.index, side, context))
        problem = weighter.fault(weights[-1])
        if problem:
            return BadRow(pair.where, f"{side}: {problem}")
    return weights[0], weights[1]
