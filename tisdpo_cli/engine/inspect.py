"""inspect-weights: the facts about scores and weights of a scored dataset, found.

It makes facts; how they look on a terminal is the CLI's business.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tisdpo_cli.artefacts import locate_model
from tisdpo_cli.data.pairs import Pair, read_pairs
from tisdpo_cli.data.reader import BadRow, find_splits, stop_or_skip
from tisdpo_cli.data.scored import MANIFEST, SIDES, Scores, check_meaning, read_manifest, require_scores
from tisdpo_cli.engine.facts import Inspection, PairView, SideSummary, Token, TokenSummary
from tisdpo_cli.engine.splits import columns_of
from tisdpo_cli.engine.weighing import Weighing, fit_centers, known, weighing
from tisdpo_cli.errors import DataError, UsageFault
from tisdpo_cli.models import Tokenizer, load_tokenizer
from tisdpo_cli.settings.commands import InspectWeights
from tisdpo_cli.steps import Centers, Context
from tisdpo_cli.weights import clipped

_CURVE_BINS = 24
# Scores of contrastive models that have learned something are spread over tenths of a nat.
_NO_SIGNAL = 0.01


@dataclass(frozen=True)
class _Side:
    """One response. Of the tokens that have a score: r, r after the steps, whether that is clipped.

    `weights` goes on with the EOS where it has one; `eos_adjusted` is its score after the steps. In a file of final
    weights r and weights are the same.
    """

    ids: list[int]
    scores: Scores
    known: Tensor
    adjusted: Tensor
    weights: Tensor
    clipped: Tensor
    eos_adjusted: float | None

    @property
    def shown(self) -> Tensor:
        """Scores of what `weights` holds: the known tokens, and the EOS where it has a weight."""
        extra = self.weights.numel() - self.known.numel()
        eos = 0.0 if self.scores.eos is None else self.scores.eos
        return torch.cat([self.known, torch.full((extra,), eos)])

    def values(self, show: str) -> Tensor:
        """What is shown of the tokens that have a score, the EOS left out."""
        return {"scores": self.known, "adjusted": self.adjusted, "weights": self.weights[: len(self.known)]}[show]


Sides = Sequence[tuple[_Side, _Side]]


def inspect_weights(settings: InspectWeights) -> Inspection:
    """Read a scored dataset and find the facts.

    Raises:
        TisdpoError: the dataset is not scored, does not fit its tokenizer, or the pair does not exist.
    """
    files = find_splits(settings.scored)
    if settings.split not in files:
        raise UsageFault(f"no split {settings.split!r} here (there is {', '.join(files)})", where="--split")
    final = settings.weights.weights_are == "final"
    read = read_pairs(files[settings.split], columns_of(settings.data), settings.data.on_bad_row)
    require_scores((pair.row for pair in read.pairs), settings.scored, final)
    check_meaning(read_manifest(Path(settings.scored).expanduser()) or {}, files[settings.split], final)
    tokenizer = load_tokenizer(_tokenizer_path(settings))
    centers = _centers(settings, files["train"], tokenizer)
    how = weighing(settings.weights, settings.seed, tokenizer, read.pairs, centers)
    pairs, sides, skipped = _all_sides(settings, read.pairs, how)
    at = _position_of(settings.index, pairs) if settings.index is not None else _widest(sides, final)
    logarithmic, scale = _scale(sides, settings.show)
    highest, lowest = _extreme_tokens(sides, tokenizer, settings.top, settings.min_count)
    return Inspection(
        source=settings.scored,
        split=settings.split,
        transform=how.recipe.describe(),
        show=settings.show,
        pairs=len(pairs),
        separation=None if final else statistics.fmean(float(_total(c) > _total(r)) for c, r in sides),
        sides={name: _summary([both[k] for both in sides], how) for k, name in enumerate(SIDES)},
        ranked_by="weight" if final else "r after the steps" if how.recipe.steps else "r",
        highest=highest,
        lowest=lowest,
        curves={name: _curve([both[k] for both in sides], settings.show) for k, name in enumerate(SIDES)},
        scale=scale,
        logarithmic=logarithmic,
        notices=[*read.notices, *skipped, *([] if final else _without_signal(sides))],
        pair=_view(pairs[at], sides[at], tokenizer, final),
        provenance=_provenance(settings),
    )


def _centers(settings: InspectWeights, train: Path, tokenizer: Tokenizer) -> Centers | None:
    """The means that training subtracts: those of the train split, whatever split is shown."""
    if "center" not in settings.weights.steps():
        return None
    pairs = read_pairs(train, columns_of(settings.data), settings.data.on_bad_row).pairs
    chosen, rejected = (tokenizer.encode([getattr(pair, side) for pair in pairs]) for side in SIDES)
    tokens = [(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]
    return fit_centers(settings.weights, pairs, tokens)


def _tokenizer_path(settings: InspectWeights) -> Path:
    if settings.tokenizer is not None:
        path = Path(settings.tokenizer).expanduser()
        return path if (path / "tokenizer_config.json").is_file() else locate_model(settings.tokenizer, "--tokenizer")
    scored = Path(settings.scored).expanduser()
    folder = scored if scored.is_dir() else scored.parent
    if not (folder / "tokenizer_config.json").is_file():
        raise UsageFault(
            "no tokenizer lies beside this dataset", where=settings.scored, fix="name it with --tokenizer PATH"
        )
    return folder


def _all_sides(
    settings: InspectWeights, pairs: Sequence[Pair], how: Weighing
) -> tuple[list[Pair], list[tuple[_Side, _Side]], list[str]]:
    """The pairs whose scores can be used, both sides of each, and what to say of the others."""
    chosen, rejected = (how.tokenizer.encode([getattr(pair, side) for pair in pairs]) for side in SIDES)
    kept, sides, bad = [], [], []
    for pair, contexts, *both in zip(pairs, how.contexts_of_pairs(pairs), chosen, rejected, strict=True):
        made = [_side(pair, side, ids, how, c) for side, ids, c in zip(SIDES, both, contexts, strict=True)]
        faults = [side for side in made if isinstance(side, BadRow)]
        if faults:
            bad.append(faults[0])
        else:
            kept.append(pair)
            sides.append((made[0], made[1]))
    return kept, sides, stop_or_skip(bad, len(pairs), settings.data.on_bad_row)  # type: ignore[return-value]


def _side(pair: Pair, side: Any, ids: list[int], how: Weighing, context: Context) -> _Side | BadRow:
    scores = how.read(pair, side, len(ids), "the tokenizer beside it")
    if isinstance(scores, BadRow):
        return scores
    values, stepped = known(scores), how.adjusted(scores, context)
    adjusted, eos_adjusted = stepped[: len(values)], stepped[len(values) :].tolist()
    has_eos = len(values) == len(ids) and (scores.eos is not None or how.recipe.eos_weight != "score")
    weights = how.weights(scores, len(values), has_eos, pair.index, side, context)
    hit = clipped(adjusted, side, how.recipe)
    return _Side(ids, scores, values, adjusted, weights, hit, eos_adjusted[0] if eos_adjusted else None)


def _total(side: _Side) -> float:
    return float(side.known.sum()) + (side.scores.eos or 0.0)


def _without_signal(sides: Sides) -> list[str]:
    scores = torch.cat([side.known for both in sides for side in both])
    if len(scores) and float(scores.std(correction=0)) >= _NO_SIGNAL:
        return []
    return [
        "the scores are almost zero: the contrastive models hardly differ from each other; train them longer, with a "
        "shorter --warmup-steps or a higher --learning-rate"
    ]


def _position_of(index: int, pairs: Sequence[Pair]) -> int:
    found = next((at for at, pair in enumerate(pairs) if pair.index == index), None)
    if found is None:
        raise UsageFault(
            f"no such pair; there are {len(pairs)} pairs, 0 to {pairs[-1].index}", where=f"--index {index}"
        )
    return found


def _widest(sides: Sides, final: bool) -> int:
    """The pair whose scores are spread most, or whose final weights are farthest from 1."""
    neutral = 1.0 if final else 0.0

    def spread(side: _Side) -> float:
        return float((side.known - neutral).square().mean()) if len(side.known) else 0.0

    return max(range(len(sides)), key=lambda i: sum(spread(side) for side in sides[i]))


def _summary(sides: Sequence[_Side], how: Weighing) -> SideSummary:
    weights = torch.cat([side.weights for side in sides])
    if not len(weights):
        raise DataError("no token of this split is scored")
    scores = None if how.recipe.final else torch.cat([side.shown for side in sides])
    adjusted = torch.cat([side.adjusted for side in sides]) if how.recipe.steps else None
    sizes = [
        float(w.sum() ** 2 / (w.square().sum() * len(w))) for w in (s.weights for s in sides) if w.square().sum() > 0
    ]
    hit = torch.cat([side.clipped for side in sides])
    return SideSummary(
        tokens=sum(len(side.ids) for side in sides),
        unscored=sum(len(side.ids) - len(side.known) for side in sides),
        mean_score=_mean(scores),
        sd_score=_spread(scores),
        mean_adjusted=_mean(adjusted),
        sd_adjusted=_spread(adjusted),
        mean_weight=float(weights.mean()),
        sd_weight=float(weights.std(correction=0)),
        min_weight=float(weights.min()),
        max_weight=float(weights.max()),
        share_clipped=float(hit.float().mean()) if len(hit) else 0.0,
        effective_sample_size=statistics.fmean(sizes) if sizes else 0.0,
    )


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())


def _spread(values: Tensor | None) -> float | None:
    return None if values is None else float(values.std(correction=0))


def _extreme_tokens(
    sides: Iterable[tuple[_Side, _Side]], tokenizer: Tokenizer, top: int, min_count: int
) -> tuple[list[TokenSummary], list[TokenSummary]]:
    """Tokens with the highest and the lowest mean score after the steps, or final weight, over both sides."""
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for both in sides:
        for side in both:
            scored = (token for token, r in zip(side.ids, side.scores.tokens, strict=True) if r is not None)
            values = zip(side.adjusted.tolist(), side.values("weights").tolist(), strict=True)
            for token, value in zip(scored, values, strict=True):
                found[token].append(value)
    means = {
        token: [statistics.fmean(column) for column in zip(*values, strict=True)]
        for token, values in found.items()
        if len(values) >= min_count
    }
    ranked = sorted(means, key=lambda token: (-means[token][0], token))

    def summaries(tokens: Sequence[int]) -> list[TokenSummary]:
        texts = tokenizer.pieces(tokens)
        return [TokenSummary(x, len(found[t]), *means[t]) for t, x in zip(tokens, texts, strict=True)]

    return summaries(ranked[:top]), summaries(ranked[::-1][:top])


def _curve(sides: Sequence[_Side], show: str) -> list[float]:
    """Mean by relative position in the response."""
    sums, counts = torch.zeros(_CURVE_BINS), torch.zeros(_CURVE_BINS)
    for side in sides:
        values = side.values(show)
        bins = (torch.arange(len(values)) * _CURVE_BINS // max(1, len(values))).long()
        sums.index_add_(0, bins, values)
        counts.index_add_(0, bins, torch.ones_like(values))
    return (sums / counts.clamp(min=1)).tolist()


def _scale(sides: Sides, show: str) -> tuple[bool, float]:
    """Whether the colour scale is logarithmic, and its half width. The EOS is left out: it may be set to zero."""
    values = torch.cat([side.values(show) for both in sides for side in both])
    if show != "weights":
        return False, _percentile(values.abs())
    if bool((values > 0).all()):
        return True, _percentile(values.log().abs())
    return False, _percentile((values - 1).abs())


def _percentile(sizes: Tensor) -> float:
    ordered = sizes.sort().values
    return max(float(ordered[int(0.99 * (len(ordered) - 1))]), 1e-6)


def _view(pair: Pair, both: tuple[_Side, _Side], tokenizer: Tokenizer, final: bool) -> PairView:
    chosen, rejected = (_tokens(side, tokenizer, final) for side in both)
    return PairView(pair.index, pair.row.where, pair.prompt, chosen, rejected)


def _tokens(side: _Side, tokenizer: Tokenizer, final: bool) -> list[Token]:
    def token(position: int, at: int, text: str, kind: str, *values: float | None, hit: bool = False) -> Token:
        score, adjusted, weight = values
        scores = (None, None) if final else (score, adjusted)
        return Token(position, at, text, kind, scores[0], scores[1], weight, hit)

    columns = (side.known, side.adjusted, side.values("weights"), side.clipped)
    rows = iter(zip(*(column.tolist() for column in columns), strict=True))
    made = []
    for position, (at, text, r) in enumerate(
        zip(side.ids, tokenizer.pieces(side.ids), side.scores.tokens, strict=True)
    ):
        if r is None:
            made.append(token(position, at, text, "unscored", None, None, None))
        else:
            *values, hit = next(rows)
            made.append(token(position, at, text, "text", *values, hit=hit))
    if len(side.weights) > len(side.known):
        text, weight = tokenizer.pieces([tokenizer.eos])[0], float(side.weights[-1])
        made.append(token(len(side.ids), tokenizer.eos, text, "eos", side.scores.eos, side.eos_adjusted, weight))
    return made


def _provenance(settings: InspectWeights) -> dict[str, Any]:
    manifest = read_manifest(Path(settings.scored).expanduser())
    return manifest if manifest is not None else {"note": f"no {MANIFEST} beside the data"}
