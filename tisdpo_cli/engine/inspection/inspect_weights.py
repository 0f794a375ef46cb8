"""inspect-weights: the facts about scores and weights of a scored dataset, found.

It makes facts; how they look on a terminal or a page is not its business.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.data.tokens import shared_characters
from tisdpo_cli.engine.inspection.comparison import compare
from tisdpo_cli.engine.inspection.results import Inspection, PairView, ResponseFacts, Token
from tisdpo_cli.engine.inspection.summaries import (
    Tokens,
    checks,
    curve,
    scale,
    score_histogram,
    separation,
    size_histogram,
    summary,
)
from tisdpo_cli.engine.inspection.weighted_split import (
    InspectedPair,
    WeightedResponse,
    WeightedSplit,
    manifest_of,
    read_weighted_split,
)
from tisdpo_cli.errors import UsageError
from tisdpo_cli.method.recipe import Recipe, transform_scores
from tisdpo_cli.method.transforms import RandomStream, Side
from tisdpo_cli.runs.outputs import versions
from tisdpo_cli.settings.inspect_weights import InspectWeights

# Pairs in a report, unless a limit is given: a page that opens at once.
_IN_A_REPORT = 1000


def inspect_weights(settings: InspectWeights, command: str | None = None) -> Inspection:
    """Read a scored dataset and find the facts.

    Args:
        settings: what to look at.
        command: the command line, for the provenance.

    Raises:
        TisdpoError: the dataset is not scored, does not fit its tokenizer, or the pair does not exist.
    """
    split = read_weighted_split(settings, settings.scored)
    recipe, final = split.how.recipe, split.final
    eos_scores = recipe.eos_weight == "score"
    shown = ["weights"] if final else ["weights", "scores", *(["adjusted"] if recipe.steps else [])]
    previews = _previews(settings, recipe, eos_scores) if settings.html is not None and not final else {}
    others = {name: split.under(other) for name, other in previews.items()}
    tokens = Tokens(split, settings.min_count)
    by_r, by_weight = (tokens.extremes(by, settings.top) for by in ("ranked", "weights"))
    sides = {name: summary(split.side(k), not final, bool(recipe.steps)) for k, name in enumerate(SIDES)}
    tests = checks(split, settings.checks, sides, None if final else tokens.offset())
    order = _order(settings, split)
    return Inspection(
        source=settings.scored,
        split=settings.split,
        transform=recipe.describe(),
        show=settings.show,
        pairs=len(split.pairs),
        separation=None if final else separation(split),
        sides=sides,
        ranked_by="weight" if final else "r after the steps" if recipe.steps else "r",
        highest=by_r[0],
        lowest=by_r[1],
        heaviest=by_weight[0],
        lightest=by_weight[1],
        scores=score_histogram(split),
        sizes=size_histogram(split),
        curves={show: {name: curve(split.side(k), show) for k, name in enumerate(SIDES)} for show in shown},
        scales={show: scale(split, show) for show in dict.fromkeys([*shown, settings.show])}
        | {name: scale(other, "weights") for name, other in others.items()},
        checks=tests,
        comparison=compare(settings, split, eos_scores) if settings.compare is not None else None,
        notices=[*split.notices, *(f"{test.says}; {test.fix}" for test in tests if not test.passed)],
        views=[_view(split, others, i) for i in order],
        previews=list(previews),
        provenance=_provenance(settings, split, command),
    )


def _previews(settings: InspectWeights, recipe: Recipe, eos_scores: bool) -> dict[str, Recipe]:
    """The transforms to switch to, by what they are called; the one in use is not among them."""
    made = [settings.weights.other_recipe(spec, eos_scores) for spec in settings.previews.split()]
    return {other.name(): other for other in made if other != recipe}


def _order(settings: InspectWeights, split: WeightedSplit) -> list[int]:
    """Which pairs are shown, as places in the split."""
    if settings.index is not None:
        return [_position_of(settings.index, split.pairs)]
    limit = settings.limit
    if limit is None and settings.table is None:
        limit = 1 if settings.html is None else _IN_A_REPORT
    places = list(range(len(split.pairs)))
    if settings.sort == "random":
        random.Random(settings.seed).shuffle(places)
    elif settings.sort != "index":
        keys = [_key(settings.sort, pair, split.final) for pair in split.pairs]
        places.sort(key=lambda i: (-keys[i], i))
    return places[:limit]


def _key(sort: str, pair: InspectedPair, final: bool) -> float:
    """What pairs are sorted by, highest first."""
    if sort == "max-weight":
        return max((float(side.weights.max()) for side in pair.sides if len(side.weights)), default=float("-inf"))
    if sort == "min-mean":
        return -min((float(side.weights.mean()) for side in pair.sides if len(side.weights)), default=float("inf"))
    # Scores are spread around 0, final weights around 1.
    neutral = 1.0 if final else 0.0
    return sum(float((side.known - neutral).square().mean()) for side in pair.sides if len(side.known))


def _position_of(index: int, pairs: Sequence[InspectedPair]) -> int:
    found = next((at for at, pair in enumerate(pairs) if pair.pair.index == index), None)
    if found is None:
        raise UsageError(
            f"no such pair; there are {len(pairs)} pairs, 0 to {pairs[-1].pair.index}", where=f"--index {index}"
        )
    return found


# Pairs, token by token -----------------------------------------------------------------------------------------


def _view(split: WeightedSplit, others: dict[str, WeightedSplit], at: int) -> PairView:
    pair = split.pairs[at]
    chosen, rejected = _tokens(split, pair, "chosen", pair.chosen), _tokens(split, pair, "rejected", pair.rejected)
    return PairView(
        index=pair.pair.index,
        where=pair.pair.row.where,
        prompt=pair.pair.prompt,
        chosen=chosen,
        rejected=rejected,
        sides={name: _facts(side, split.final) for name, side in zip(SIDES, pair.sides, strict=True)},
        previews={
            name: {side: _laid_out(weighed) for side, weighed in zip(SIDES, other.pairs[at].sides, strict=True)}
            for name, other in others.items()
        },
    )


def _facts(side: WeightedResponse, final: bool) -> ResponseFacts:
    hit = side.clipped
    return ResponseFacts(
        total_score=None if final else side.total,
        mean_weight=float(side.weights.mean()) if len(side.weights) else 0.0,
        share_clipped=float(hit.float().mean()) if len(hit) else 0.0,
        effective_sample_size=side.effective_size,
    )


def _laid_out(side: WeightedResponse) -> list[float | None]:
    """Weights of all tokens, None where there is no score, and of the EOS where it has one."""
    weights = iter(side.weights.tolist())
    return [None if r is None else next(weights) for r in side.scores.tokens] + list(weights)


def _tokens(split: WeightedSplit, pair: InspectedPair, name: Side, side: WeightedResponse) -> list[Token]:
    tokenizer, how = split.how.tokenizer, split.how
    ids = [*side.ids, *([tokenizer.eos] if side.has_eos else [])]
    texts, parts = tokenizer.pieces(ids), tokenizer.token_bytes(ids)
    groups = {
        i: (number, text)
        for number, (begin, end, text) in enumerate(shared_characters(parts))
        for i in range(begin, end)
    }
    columns = {
        "score": _spread_out(side, side.known, side.scores.eos),
        "adjusted": _spread_out(side, side.adjusted, side.eos_adjusted),
        "unclipped": _spread_out(
            side, _unclipped(side, name, how.recipe, RandomStream(how.seed, pair.pair.index, name))
        ),
        "clipped": _spread_out(side, side.clipped),
    }
    weights = _laid_out(side)
    made = []
    for i, at in enumerate(ids):
        group, character = groups.get(i, (None, ""))
        weight = weights[i]
        made.append(
            Token(
                position=i,
                id=at,
                text=texts[i],
                bytes=parts[i].hex(),
                kind="text" if i < len(side.ids) else "eos",
                character=character,
                group=group,
                logp_forward=side.logps["forward"][i] if side.logps else None,
                logp_reverse=side.logps["reverse"][i] if side.logps else None,
                score=None if split.final else columns["score"][i],
                adjusted=None if split.final else columns["adjusted"][i],
                weight=weight,
                unclipped=weight if columns["unclipped"][i] is None else columns["unclipped"][i],
                clipped=bool(columns["clipped"][i]),
                masked=weight == 0,
                truncated=weight is None,
            )
        )
    return made


def _spread_out(side: WeightedResponse, values: Tensor, eos: float | None = None) -> list[Any]:
    """A value for each token of the response and its EOS, from those that have a score."""
    known = iter(values.tolist())
    return [None if r is None else next(known) for r in side.scores.tokens] + [eos]


def _unclipped(side: WeightedResponse, name: Side, recipe: Recipe, stream: RandomStream) -> Tensor:
    """Weights [n] of the tokens that have a score as they would be without the clamp of the transform."""
    raw = transform_scores(side.adjusted, name, recipe, stream, clip=False)
    if recipe.normalize == "mean" and len(side.known):
        raw = raw / transform_scores(side.adjusted, name, recipe, stream).mean()
    # What the clamp leaves alone is the same number to the last bit.
    return torch.where(side.clipped, raw, side.values("weights"))


def _provenance(settings: InspectWeights, split: WeightedSplit, command: str | None) -> dict[str, Any]:
    return {
        **manifest_of(settings.scored),
        "weights": split.how.recipe.describe(),
        "tokenizer in use": split.how.tokenizer.digest,
        "command": command,
        "shown by": versions(),
    }
