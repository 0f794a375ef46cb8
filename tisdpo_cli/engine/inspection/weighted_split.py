"""A split of a scored dataset with the weight of every token: what inspect-weights finds its facts in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tisdpo_cli.data.pairs import Pair, read_pairs
from tisdpo_cli.data.reader import find_splits
from tisdpo_cli.data.rows import BadRow, handle_bad_rows
from tisdpo_cli.data.scored import (
    MANIFEST,
    SIDES,
    Logps,
    Scores,
    check_unchanged,
    read_logps,
    read_manifest,
    require_scores,
)
from tisdpo_cli.engine.arguments import columns_of
from tisdpo_cli.engine.scoring.token_weights import TokenWeighter, fit_centers, known, token_weighter
from tisdpo_cli.errors import UsageError
from tisdpo_cli.method.recipe import Recipe, clipped
from tisdpo_cli.method.steps import Centers, Context
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer
from tisdpo_cli.settings.inspect_weights import InspectWeights


@dataclass(frozen=True)
class WeightedResponse:
    """One response. Of the tokens that have a score: r, r after the steps, whether that is clipped.

    `weights` goes on with the EOS where it has one; `eos_adjusted` is its score after the steps. In a file of final
    weights r and weights are the same.
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

    @property
    def has_eos(self) -> bool:
        """Whether the EOS is weighed."""
        return self.weights.numel() > self.known.numel()

    @property
    def scored(self) -> Tensor:
        """Scores of what `weights` holds: the known tokens, and the EOS where it has a weight."""
        eos = 0.0 if self.scores.eos is None else self.scores.eos
        return torch.cat([self.known, torch.full((int(self.has_eos),), eos)])

    @property
    def known_ids(self) -> list[int]:
        """Ids of the tokens that have a score."""
        return [at for at, r in zip(self.ids, self.scores.tokens, strict=True) if r is not None]

    @property
    def total(self) -> float:
        """Σ r, the EOS included where scored."""
        return float(self.known.sum()) + (self.scores.eos or 0.0)

    @property
    def effective_size(self) -> float:
        """(Σw)² / (n Σw²): 1 where all weights are equal, 0 where there are none."""
        squares = float(self.weights.square().sum()) * len(self.weights)
        return float(self.weights.sum()) ** 2 / squares if squares else 0.0

    def values(self, show: str) -> Tensor:
        """What is shown of the tokens that have a score, the EOS left out."""
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
    """The pairs whose scores can be used, how they are weighed, and what to say of the others."""

    pairs: list[InspectedPair]
    how: TokenWeighter
    notices: list[str]

    @property
    def final(self) -> bool:
        """Whether the file holds weights."""
        return self.how.recipe.final

    @property
    def responses(self) -> list[WeightedResponse]:
        """All responses."""
        return [side for pair in self.pairs for side in pair.sides]

    def side(self, number: int) -> list[WeightedResponse]:
        """Chosen (0) or rejected (1) responses."""
        return [pair.sides[number] for pair in self.pairs]

    def under(self, recipe: Recipe) -> WeightedSplit:
        """The same scores under another recipe with the same steps."""
        how = replace(self.how, recipe=recipe)
        made = []
        for one in self.pairs:
            sides = [_again(one.pair.index, name, side, how) for name, side in zip(SIDES, one.sides, strict=True)]
            made.append(InspectedPair(one.pair, sides[0], sides[1]))
        return WeightedSplit(made, how, [])


def _again(index: int, name: Any, side: WeightedResponse, how: TokenWeighter) -> WeightedResponse:
    weights = how.weights(side.scores, len(side.known), side.has_eos, index, name, side.context)
    return replace(side, weights=weights, clipped=clipped(side.adjusted, name, how.recipe))


def read_weighted_split(settings: InspectWeights, scored: str) -> WeightedSplit:
    """Read the split that is asked for of a scored dataset and weigh every token.

    Args:
        settings: columns, split, tokenizer and how weights are made.
        scored: the dataset; that of the settings, or one that it is compared with.

    Raises:
        TisdpoError: the dataset is not scored, does not fit its tokenizer, or has no such split.
    """
    files = find_splits(scored)
    if settings.split not in files:
        raise UsageError(f"no split {settings.split!r} here (there is {', '.join(files)})", where="--split")
    file, final = files[settings.split], settings.weights.weights_are == "final"
    read = read_pairs(file, columns_of(settings.data), settings.data.on_bad_row)
    require_scores((pair.row for pair in read.pairs), scored, final)
    changed = check_unchanged(read_manifest(Path(scored).expanduser()) or {}, file, final)
    tokenizer = load_tokenizer(_tokenizer_path(settings, scored))
    centers = _centers(settings, files["train"], tokenizer)
    how = token_weighter(settings.weights, settings.seed, tokenizer, read.pairs, centers)
    pairs, skipped = _all_pairs(settings, read.pairs, how)
    # A changed file of scores is nothing to warn of; weights that may be scores are.
    return WeightedSplit(pairs, how, [*read.notices, *([changed] if changed and final else []), *skipped])


def _centers(settings: InspectWeights, train: Path, tokenizer: Tokenizer) -> Centers | None:
    """The means that training subtracts: those of the train split, whatever split is shown."""
    if "center" not in settings.weights.steps():
        return None
    pairs = read_pairs(train, columns_of(settings.data), settings.data.on_bad_row).pairs
    chosen, rejected = (tokenizer.encode([getattr(pair, side) for pair in pairs]) for side in SIDES)
    tokens = [(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]
    return fit_centers(settings.weights, pairs, tokens)


def _tokenizer_path(settings: InspectWeights, scored: str) -> Path:
    if settings.tokenizer is not None:
        path = Path(settings.tokenizer).expanduser()
        return path if (path / "tokenizer_config.json").is_file() else locate_model(settings.tokenizer, "--tokenizer")
    where = Path(scored).expanduser()
    folder = where if where.is_dir() else where.parent
    if not (folder / "tokenizer_config.json").is_file():
        raise UsageError("no tokenizer lies beside this dataset", where=scored, fix="name it with --tokenizer PATH")
    return folder


def _all_pairs(
    settings: InspectWeights, pairs: Sequence[Pair], how: TokenWeighter
) -> tuple[list[InspectedPair], list[str]]:
    chosen, rejected = (how.tokenizer.encode([getattr(pair, side) for pair in pairs]) for side in SIDES)
    made: list[InspectedPair] = []
    bad: list[BadRow] = []
    for pair, contexts, *both in zip(pairs, how.contexts_of_pairs(pairs), chosen, rejected, strict=True):
        sides = [_weighed(pair, side, ids, how, c) for side, ids, c in zip(SIDES, both, contexts, strict=True)]
        good = [side for side in sides if isinstance(side, WeightedResponse)]
        if len(good) == len(SIDES):
            made.append(InspectedPair(pair, good[0], good[1]))
        else:
            bad.append(next(side for side in sides if isinstance(side, BadRow)))
    return made, handle_bad_rows(bad, len(pairs), settings.data.on_bad_row)


def _weighed(pair: Pair, side: Any, ids: list[int], how: TokenWeighter, context: Context) -> WeightedResponse | BadRow:
    scores, logps = how.read(pair, side, len(ids), "the tokenizer in use"), read_logps(pair.row, side, len(ids))
    if isinstance(scores, BadRow):
        return scores
    if isinstance(logps, BadRow):
        return logps
    values, stepped = known(scores), how.adjusted(scores, context)
    adjusted, eos_adjusted = stepped[: len(values)], stepped[len(values) :].tolist()
    has_eos = len(values) == len(ids) and (scores.eos is not None or how.recipe.eos_weight != "score")
    weights = how.weights(scores, len(values), has_eos, pair.index, side, context)
    beyond = how.fault(weights)
    if beyond:
        return BadRow(pair.row.where, f"{side}: {beyond}")
    hit = clipped(adjusted, side, how.recipe)
    eos = eos_adjusted[0] if eos_adjusted else None
    return WeightedResponse(ids, scores, logps, values, adjusted, weights, hit, eos, context)


def manifest_of(scored: str) -> dict[str, Any]:
    """What `estimate.json` says of a dataset; a note where there is none."""
    manifest = read_manifest(Path(scored).expanduser())
    return manifest if manifest is not None else {"note": f"no {MANIFEST} beside the data"}
