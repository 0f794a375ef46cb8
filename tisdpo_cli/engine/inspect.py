"""inspect-weights: the facts about scores and weights of a scored dataset, for people and for programs.

It makes facts; how they look on a terminal is the CLI's business.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tisdpo_cli.artefacts import locate_model
from tisdpo_cli.data.pairs import Pair, read_pairs
from tisdpo_cli.data.reader import BadRow, find_splits, stop_or_skip
from tisdpo_cli.data.scored import MANIFEST, Scores, hold_eos_scores, read_manifest, read_scores, require_scores
from tisdpo_cli.engine.pairs import side_weights
from tisdpo_cli.engine.splits import columns_of
from tisdpo_cli.errors import DataError, UsageFault
from tisdpo_cli.models import Tokenizer, load_tokenizer
from tisdpo_cli.settings.commands import InspectWeights
from tisdpo_cli.weights import Recipe, Stream, clipped

_CURVE_BINS = 24
# Scores of contrastive models that have learned something are spread over tenths of a nat.
_NO_SIGNAL = 0.01


@dataclass(frozen=True)
class Token:
    """One response token. `score` is r in nats, `weight` what the transform makes of it; None beyond the cut."""

    position: int
    id: int
    text: str
    kind: str
    score: float | None
    weight: float | None
    clipped: bool


@dataclass(frozen=True)
class PairView:
    """A pair, token by token."""

    index: int
    where: str
    prompt: str
    chosen: list[Token]
    rejected: list[Token]


@dataclass(frozen=True)
class SideSummary:
    """What there is on one side of the file. Means and spreads over tokens, the EOS included where scored."""

    tokens: int
    unscored: int
    mean_score: float
    sd_score: float
    mean_weight: float
    sd_weight: float
    min_weight: float
    max_weight: float
    share_clipped: float
    effective_sample_size: float


@dataclass(frozen=True)
class TokenSummary:
    """A token over all its occurrences."""

    text: str
    count: int
    mean_score: float


@dataclass(frozen=True)
class Inspection:
    """Everything that is shown.

    Attributes:
        separation: share of pairs in which Σ r of the chosen response is above that of the rejected one.
        curves: mean of the shown value by relative position, for each side.
        scale: half width of the colour scale: the 99th percentile of the distance from neutral.
        logarithmic: whether that distance is |log weight|; it is |weight − 1| where some weights are not above 0,
            and |score| for scores.
        notices: what to tell beside the view, skipped rows for example.
    """

    source: str
    split: str
    transform: str
    show: str
    pairs: int
    separation: float
    sides: dict[str, SideSummary]
    highest: list[TokenSummary]
    lowest: list[TokenSummary]
    curves: dict[str, list[float]]
    scale: float
    logarithmic: bool
    notices: list[str]
    pair: PairView
    provenance: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Side:
    ids: list[int]
    scores: Scores
    known: Tensor
    weights: Tensor
    clipped: Tensor

    @property
    def shown(self) -> Tensor:
        """Scores of what `weights` holds: the known tokens, and the EOS where it has a weight."""
        extra = self.weights.numel() - self.known.numel()
        eos = 0.0 if self.scores.eos is None else self.scores.eos
        return torch.cat([self.known, torch.full((extra,), eos)])


def inspect_weights(settings: InspectWeights) -> Inspection:
    """Read a scored dataset and find the facts.

    Raises:
        TisdpoError: the dataset is not scored, does not fit its tokenizer, or the pair does not exist.
    """
    files = find_splits(settings.scored)
    if settings.split not in files:
        raise UsageFault(f"no split {settings.split!r} here (there is {', '.join(files)})", where="--split")
    read = read_pairs(files[settings.split], columns_of(settings.data), settings.data.on_bad_row)
    require_scores((pair.row for pair in read.pairs), settings.scored)
    tokenizer = load_tokenizer(_tokenizer_path(settings))
    recipe = settings.weights.recipe(hold_eos_scores(pair.row for pair in read.pairs))
    pairs, sides, skipped = _all_sides(settings, tokenizer, read.pairs, recipe)
    at = _position_of(settings.index, pairs) if settings.index is not None else _widest(sides)
    logarithmic, scale = _scale(sides, settings.show)
    highest, lowest = _extreme_tokens(sides, tokenizer, settings.top, settings.min_count)
    return Inspection(
        source=settings.scored,
        split=settings.split,
        transform=recipe.describe(),
        show=settings.show,
        pairs=len(pairs),
        separation=statistics.fmean(float(_total(c) > _total(r)) for c, r in sides),
        sides={"chosen": _summary([c for c, _ in sides]), "rejected": _summary([r for _, r in sides])},
        highest=highest,
        lowest=lowest,
        curves={
            name: _curve([both[k] for both in sides], settings.show) for k, name in enumerate(("chosen", "rejected"))
        },
        scale=scale,
        logarithmic=logarithmic,
        notices=[*read.notices, *skipped, *_without_signal(sides)],
        pair=_view(pairs[at], sides[at], tokenizer),
        provenance=_provenance(settings),
    )


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
    settings: InspectWeights, tokenizer: Tokenizer, pairs: Sequence[Pair], recipe: Recipe
) -> tuple[list[Pair], list[tuple[_Side, _Side]], list[str]]:
    """The pairs whose scores can be used, both sides of each, and what to say of the others."""
    chosen = tokenizer.encode([pair.chosen for pair in pairs])
    rejected = tokenizer.encode([pair.rejected for pair in pairs])
    kept, sides, bad = [], [], []
    for pair, *both in zip(pairs, chosen, rejected, strict=True):
        made = []
        for side, ids in zip(("chosen", "rejected"), both, strict=True):
            scores = read_scores(pair.row, side, len(ids), "the tokenizer beside it")
            if isinstance(scores, BadRow):
                bad.append(scores)
                break
            made.append(_side(ids, scores, recipe, Stream(settings.seed, pair.index, side)))  # type: ignore[arg-type]
        else:
            kept.append(pair)
            sides.append((made[0], made[1]))
    return kept, sides, stop_or_skip(bad, len(pairs), settings.data.on_bad_row)


def _side(ids: list[int], scores: Scores, recipe: Recipe, stream: Stream) -> _Side:
    known = torch.tensor([r for r in scores.tokens if r is not None], dtype=torch.float32)
    whole = len(known) == len(ids)
    has_eos = whole and (scores.eos is not None or recipe.eos_weight != "score")
    weights = side_weights(scores, len(known), has_eos, recipe, stream)
    return _Side(ids, scores, known, weights, clipped(known, stream.side, recipe))


def _total(side: _Side) -> float:
    return float(side.known.sum()) + (side.scores.eos or 0.0)


def _without_signal(sides: Sequence[tuple[_Side, _Side]]) -> list[str]:
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


def _widest(sides: Sequence[tuple[_Side, _Side]]) -> int:
    """The pair whose scores are spread most."""
    return max(
        range(len(sides)), key=lambda i: sum(float(s.known.square().mean()) if len(s.known) else 0.0 for s in sides[i])
    )


def _summary(sides: Sequence[_Side]) -> SideSummary:
    scores = torch.cat([side.shown for side in sides])
    weights = torch.cat([side.weights for side in sides])
    if not len(weights):
        raise DataError("no token of this split is scored")
    sizes = [
        float(w.sum() ** 2 / (w.square().sum() * len(w))) for w in (s.weights for s in sides) if w.square().sum() > 0
    ]
    hit = torch.cat([side.clipped for side in sides])
    return SideSummary(
        tokens=sum(len(side.ids) for side in sides),
        unscored=sum(len(side.ids) - len(side.known) for side in sides),
        mean_score=float(scores.mean()),
        sd_score=float(scores.std(correction=0)),
        mean_weight=float(weights.mean()),
        sd_weight=float(weights.std(correction=0)),
        min_weight=float(weights.min()),
        max_weight=float(weights.max()),
        share_clipped=float(hit.float().mean()) if len(hit) else 0.0,
        effective_sample_size=statistics.fmean(sizes) if sizes else 0.0,
    )


def _extreme_tokens(
    sides: Iterable[tuple[_Side, _Side]], tokenizer: Tokenizer, top: int, min_count: int
) -> tuple[list[TokenSummary], list[TokenSummary]]:
    """Tokens with the highest and the lowest mean score over both sides."""
    scores: dict[int, list[float]] = defaultdict(list)
    for both in sides:
        for side in both:
            for token, r in zip(side.ids, side.scores.tokens, strict=True):
                if r is not None:
                    scores[token].append(r)
    frequent = {token: values for token, values in scores.items() if len(values) >= min_count}
    ranked = sorted(frequent, key=lambda token: (-statistics.fmean(frequent[token]), token))

    def summaries(tokens: Sequence[int]) -> list[TokenSummary]:
        texts = tokenizer.pieces(tokens)
        return [
            TokenSummary(x, len(frequent[t]), statistics.fmean(frequent[t])) for t, x in zip(tokens, texts, strict=True)
        ]

    return summaries(ranked[:top]), summaries(ranked[::-1][:top])


def _curve(sides: Sequence[_Side], show: str) -> list[float]:
    """Mean by relative position in the response."""
    sums, counts = torch.zeros(_CURVE_BINS), torch.zeros(_CURVE_BINS)
    for side in sides:
        values = (side.weights if show == "weights" else side.known)[: len(side.known)]
        bins = (torch.arange(len(values)) * _CURVE_BINS // max(1, len(values))).long()
        sums.index_add_(0, bins, values)
        counts.index_add_(0, bins, torch.ones_like(values))
    return (sums / counts.clamp(min=1)).tolist()


def _scale(sides: Sequence[tuple[_Side, _Side]], show: str) -> tuple[bool, float]:
    """Whether the colour scale is logarithmic, and its half width. The EOS is left out: it may be set to zero."""
    every = [side for both in sides for side in both]
    if show == "scores":
        return False, _percentile(torch.cat([side.known for side in every]).abs())
    weights = torch.cat([side.weights[: len(side.known)] for side in every])
    if bool((weights > 0).all()):
        return True, _percentile(weights.log().abs())
    return False, _percentile((weights - 1).abs())


def _percentile(sizes: Tensor) -> float:
    ordered = sizes.sort().values
    return max(float(ordered[int(0.99 * (len(ordered) - 1))]), 1e-6)


def _view(pair: Pair, both: tuple[_Side, _Side], tokenizer: Tokenizer) -> PairView:
    chosen, rejected = (_tokens(side, tokenizer) for side in both)
    return PairView(pair.index, pair.row.where, pair.prompt, chosen, rejected)


def _tokens(side: _Side, tokenizer: Tokenizer) -> list[Token]:
    weights = side.weights.tolist()
    hit = iter(side.clipped.tolist())
    made, known = [], 0
    for position, (token, text, r) in enumerate(
        zip(side.ids, tokenizer.pieces(side.ids), side.scores.tokens, strict=True)
    ):
        if r is None:
            made.append(Token(position, token, text, "unscored", None, None, False))
            continue
        made.append(Token(position, token, text, "text", r, weights[known], next(hit)))
        known += 1
    if len(weights) > known:
        eos = tokenizer.eos
        made.append(Token(len(side.ids), eos, tokenizer.pieces([eos])[0], "eos", side.scores.eos, weights[-1], False))
    return made


def _provenance(settings: InspectWeights) -> dict[str, Any]:
    manifest = read_manifest(Path(settings.scored).expanduser())
    return manifest if manifest is not None else {"note": f"no {MANIFEST} beside the data"}
