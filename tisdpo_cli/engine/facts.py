"""The facts about scores and weights that inspect-weights shows: plain values, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Token:
    """One response token. None where there is no such value: beyond the cut, or in a file of final weights.

    Attributes:
        score: r in nats.
        adjusted: r after the steps before the transform; r itself where there are none.
        weight: what the transform makes of it.
    """

    position: int
    id: int
    text: str
    kind: str
    score: float | None
    adjusted: float | None
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
    """What there is on one side of the file. Means and spreads over tokens, the EOS included where scored.

    Those of scores are None in a file of final weights, and those of adjusted scores where there are no steps.
    """

    tokens: int
    unscored: int
    mean_score: float | None
    sd_score: float | None
    mean_adjusted: float | None
    sd_adjusted: float | None
    mean_weight: float
    sd_weight: float
    min_weight: float
    max_weight: float
    share_clipped: float
    effective_sample_size: float


@dataclass(frozen=True)
class TokenSummary:
    """A token over all its occurrences: the mean of what the tokens are ranked by, and of their weights."""

    text: str
    count: int
    mean: float
    mean_weight: float


@dataclass(frozen=True)
class Inspection:
    """Everything that is shown.

    Attributes:
        separation: share of pairs in which Σ r of the chosen response is above that of the rejected one; None in a
            file of final weights.
        ranked_by: what `highest` and `lowest` are ranked by: `r`, `r after the steps` or `weight`.
        curves: mean of the shown value by relative position, for each side.
        scale: half width of the colour scale: the 99th percentile of the distance from neutral.
        logarithmic: whether that distance is |log weight|; it is |weight − 1| where some weights are not above 0,
            and |score| for scores, after the steps or before.
        notices: what to tell beside the view, skipped rows for example.
    """

    source: str
    split: str
    transform: str
    show: str
    pairs: int
    separation: float | None
    sides: dict[str, SideSummary]
    ranked_by: str
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
