"""Results of inspect-weights as plain values: one model behind terminal, JSON, CSV table and HTML report.

Scores are in nats, shares are between 0 and 1. The field names are the keys of `inspect-weights --json`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

# Values that can colour the tokens, and what people read.
VALUE_NAMES = {"weights": "weight", "scores": "score r", "adjusted": "r after the steps"}


@dataclass(frozen=True)
class Token:
    """One response token. A value is None where it does not exist: for truncated tokens, and scores of final weights.

    Attributes:
        position: in the uncut response, from 0.
        bytes: hexadecimal; empty if the tokenizer does not provide them.
        kind: `text`, or `eos` for the stop: the token that ends a response.
        character: for a token that holds only some bytes of a character, the text of its group of tokens.
        group: number of that group in the response; None for a token that is text by itself.
        logp_forward: log-prob under π⁺, if the dataset stores it.
        logp_reverse: log-prob under π⁻, if the dataset stores it.
        score: r.
        adjusted: r after the steps before the transform; r itself without steps.
        weight: final token weight.
        unclipped: weight if the transform did not clamp.
        clipped: whether the clamp changes the weight.
        masked: whether the weight is 0, which removes the token from the loss.
        truncated: whether the token was truncated when the dataset was scored.
    """

    position: int
    id: int
    text: str
    bytes: str
    kind: str
    character: str
    group: int | None
    logp_forward: float | None
    logp_reverse: float | None
    score: float | None
    adjusted: float | None
    weight: float | None
    unclipped: float | None
    clipped: bool
    masked: bool
    truncated: bool

    def value(self, show: str) -> float | None:
        """Its `weights`, `scores` or `adjusted` value."""
        return {"weights": self.weight, "scores": self.score, "adjusted": self.adjusted}[show]


@dataclass(frozen=True)
class ResponseFacts:
    """One response as a whole: Σ r, including a scored EOS, and statistics of its weights."""

    total_score: float | None
    mean_weight: float
    share_clipped: float
    effective_sample_size: float


@dataclass(frozen=True)
class Turn:
    """One message of a prompt; tool calls are part of its text."""

    role: str
    text: str


@dataclass(frozen=True)
class PairView:
    """One pair, token by token.

    Attributes:
        index: of the pair in its split, from 0.
        where: file and line.
        prompt: as one text.
        turns: messages of the prompt; empty if the row holds texts.
        sides: both responses as a whole, by side.
        previews: weights under other transforms: name → side → one weight per token.
    """

    index: int
    where: str
    prompt: str
    turns: list[Turn]
    chosen: list[Token]
    rejected: list[Token]
    sides: dict[str, ResponseFacts]
    previews: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class SideSummary:
    """One side of the split, chosen or rejected. Means and standard deviations are over tokens and scored EOS tokens.

    Score statistics are None for final weights; those of adjusted scores are None without steps.
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


# Label, field and format of the rows that show a summary to people.
_SUMMARY_ROWS = (
    ("tokens", "tokens", "d"),
    ("unscored tokens", "unscored", "d"),
    ("mean r", "mean_score", "+.4f"),
    ("std of r", "sd_score", ".4f"),
    ("mean r after the steps", "mean_adjusted", "+.4f"),
    ("std of r after the steps", "sd_adjusted", ".4f"),
    ("mean weight", "mean_weight", ".4f"),
    ("std of weights", "sd_weight", ".4f"),
    ("min weight", "min_weight", ".4f"),
    ("max weight", "max_weight", ".4f"),
    ("clipped", "share_clipped", ".1%"),
    ("effective sample size", "effective_sample_size", ".1%"),
)


@dataclass(frozen=True)
class Example:
    """One occurrence of a token: its pair, its side, and the surrounding text."""

    pair: int
    side: str
    before: str
    after: str


@dataclass(frozen=True)
class TokenSummary:
    """One token over all its occurrences.

    Attributes:
        mean: of the value that ranks `highest` and `lowest`.
        mean_weight: of its weights.
        share_chosen: share of its occurrences in chosen responses.
        examples: a few occurrences.
    """

    text: str
    count: int
    mean: float
    mean_weight: float
    share_chosen: float
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """Colour scale of one value, the same for the whole split.

    Attributes:
        neutral: value without a colour: 1 for weights, 0 for scores.
        width: half width: 99th percentile of the distance from neutral.
        logarithmic: whether the distance is |log weight|. It is |weight − 1| if some weights are not positive, and
            |score| for scores, adjusted or not.
    """

    neutral: float
    width: float
    logarithmic: bool

    def level(self, value: float) -> int:
        """Step on the colour scale, −4 to 4; 0 is near neutral."""
        distance = math.log(max(value, 1e-9)) if self.logarithmic else value - self.neutral
        return int(max(-1.0, min(1.0, distance / self.width)) * 4.999)

    @property
    def ends(self) -> tuple[float, float]:
        """Values at both ends."""
        if self.logarithmic:
            return math.exp(-self.width), math.exp(self.width)
        return self.neutral - self.width, self.neutral + self.width


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges, by side; the first and last bins include values outside the edges."""

    edges: list[float]
    counts: dict[str, list[int]]


@dataclass(frozen=True)
class Separation:
    """How well Σ r of a response separates chosen from rejected.

    Attributes:
        accuracy: share of pairs whose chosen response has the higher sum; ties count half.
        auc: area under the ROC curve over all responses.
        roc: points (share of rejected, share of chosen responses at or above a threshold).
    """

    accuracy: float
    auc: float
    roc: list[tuple[float, float]]


@dataclass(frozen=True)
class Check:
    """One check of the whole split.

    Attributes:
        name: short label.
        value: measured value; None if it cannot be measured.
        bound: limit for the value.
        at_least: whether the bound is a minimum; otherwise a maximum.
        passed: whether the value respects the bound.
        says: what a failure means.
        fix: how to fix it.
    """

    name: str
    value: float | None
    bound: float
    at_least: bool
    passed: bool
    says: str
    fix: str


@dataclass(frozen=True)
class RankDifference:
    """A token that two transforms or datasets rank differently: mean values, and mean ranks between 0 and 1."""

    text: str
    count: int
    first: float
    second: float
    first_rank: float
    second_rank: float


@dataclass(frozen=True)
class Comparison:
    """Two transforms of the same scores, or two datasets, over the tokens scored in both.

    Attributes:
        first: what is inspected.
        second: what it is compared with.
        of: compared value, `weights` or `scores`.
        agreement: share of tokens on the same side of neutral in both, among tokens that are neutral in neither.
        rank_correlation: Spearman's, over all tokens.
        within: Spearman's within a response, averaged over responses.
        differing: tokens with the largest difference of mean ranks.
    """

    first: str
    second: str
    of: str
    tokens: int
    agreement: float
    rank_correlation: float
    within: float
    differing: list[RankDifference]


@dataclass(frozen=True)
class Inspection:
    """Everything that inspect-weights shows.

    Attributes:
        show: value that colours the tokens: `weights`, `scores` or `adjusted`.
        pairs: number of pairs in the split.
        separation: None for final weights.
        ranked_by: value that ranks `highest` and `lowest`: `r`, `r after the steps` or `weight`.
        heaviest: tokens with the highest mean weight.
        lightest: tokens with the lowest mean weight.
        scores: histogram of r, or of the weights for final weights.
        sizes: histogram of the effective sample size of a response, as a share of its tokens.
        curves: mean by relative position: value → side → one mean per bin.
        scales: by value, and by the name of each preview.
        notices: messages to show with the view, such as skipped rows.
        views: shown pairs, in the requested order; each is made when it is asked for.
        previews: names of the other transforms in the views.
        formulas: of the `weights` and of each preview; see `Transform.formula`.
        eos_weight: how the stop is weighted.
        provenance: models, data, tokenizer, transform, command, versions.
    """

    source: str
    split: str
    transform: str
    show: str
    pairs: int
    separation: Separation | None
    sides: dict[str, SideSummary]
    ranked_by: str
    highest: list[TokenSummary]
    lowest: list[TokenSummary]
    heaviest: list[TokenSummary]
    lightest: list[TokenSummary]
    scores: Histogram
    sizes: Histogram
    curves: dict[str, dict[str, list[float]]]
    scales: dict[str, Scale]
    checks: list[Check]
    comparison: Comparison | None
    notices: list[str]
    views: Sequence[PairView]
    previews: list[str]
    formulas: dict[str, str]
    eos_weight: str
    provenance: dict[str, Any]

    @property
    def scale(self) -> Scale:
        """Colour scale of the shown value."""
        return self.scales[self.show]

    @property
    def value_name(self) -> str:
        """What people read for the shown value."""
        return VALUE_NAMES[self.show]

    def summary_rows(self) -> list[tuple[str, list[str]]]:
        """Label and one text per side, for each statistic that exists for this split."""
        rows = []
        for label, name, form in _SUMMARY_ROWS:
            values = [getattr(side, name) for side in self.sides.values()]
            if None not in values:
                rows.append((label, [format(value, form) for value in values]))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        views = [asdict(view) for view in self.views]
        return {**asdict(replace(self, views=[])), "views": views}
