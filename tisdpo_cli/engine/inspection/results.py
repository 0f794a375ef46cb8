"""The facts about scores and weights that inspect-weights shows: plain values, for people and for programs.

One model feeds the terminal, JSON, the table and the HTML report. Scores are in nats; a share is between 0 and 1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Token:
    """One response token. None where there is no such value: beyond the cut, or in a file of final weights.

    Attributes:
        position: in the uncut response, from 0.
        bytes: in hexadecimal; empty where the tokenizer does not say.
        kind: `text`, or `eos` for the end of the sequence.
        character: the text that this token and its neighbours spell together, where each has a part of its bytes only.
        group: the number of that text in the response; None where the token stands for itself.
        logp_forward: log-prob under π⁺, where the dataset keeps it.
        logp_reverse: … under π⁻.
        score: r.
        adjusted: r after the steps before the transform; r itself where there are none.
        weight: what the transform makes of it.
        unclipped: what it would make of it without its clamp.
        clipped: whether the clamp changes it.
        masked: whether its weight is 0: no say in the loss.
        truncated: whether it lay beyond the cut when the dataset was scored.
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


@dataclass(frozen=True)
class ResponseFacts:
    """One response as a whole: Σ r with the EOS where scored, and its weights."""

    total_score: float | None
    mean_weight: float
    share_clipped: float
    effective_sample_size: float


@dataclass(frozen=True)
class PairView:
    """A pair, token by token.

    Attributes:
        index: of the pair in its split, from 0.
        where: file and line.
        sides: both responses as a whole, by side.
        previews: weights under other transforms, by name and side, token by token.
    """

    index: int
    where: str
    prompt: str
    chosen: list[Token]
    rejected: list[Token]
    sides: dict[str, ResponseFacts]
    previews: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)


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
class Example:
    """Where a token occurs: the pair, the side, and the text around it."""

    pair: int
    side: str
    before: str
    after: str


@dataclass(frozen=True)
class TokenSummary:
    """A token over all its occurrences.

    Attributes:
        mean: of what `highest` and `lowest` are ranked by.
        mean_weight: of its weights.
        share_chosen: how many of its occurrences are in chosen responses.
        examples: some of them.
    """

    text: str
    count: int
    mean: float
    mean_weight: float
    share_chosen: float
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """The colour scale of one shown value, the same for the whole file.

    Attributes:
        neutral: the value without a colour: weight 1, score 0.
        width: half width: the 99th percentile of the distance from neutral.
        logarithmic: whether that distance is |log weight|; it is |weight − 1| where some weights are not above 0, and
            |score| for scores, after the steps or before.
    """

    neutral: float
    width: float
    logarithmic: bool

    def level(self, value: float) -> int:
        """The step of the colour scale, −4 to 4; 0 is near neutral."""
        distance = math.log(max(value, 1e-9)) if self.logarithmic else value - self.neutral
        return int(max(-1.0, min(1.0, distance / self.width)) * 4.999)

    @property
    def ends(self) -> tuple[float, float]:
        """The values at both ends."""
        if self.logarithmic:
            return math.exp(-self.width), math.exp(self.width)
        return self.neutral - self.width, self.neutral + self.width


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges, by side; the first and the last bin hold what lies beyond, too."""

    edges: list[float]
    counts: dict[str, list[int]]


@dataclass(frozen=True)
class Separation:
    """Whether Σ r of a response tells chosen from rejected.

    Attributes:
        accuracy: share of pairs in which the chosen response has the higher sum; equal sums count half.
        auc: area under the ROC curve over all responses.
        roc: points (share of rejected, share of chosen responses above a threshold).
    """

    accuracy: float
    auc: float
    roc: list[tuple[float, float]]


@dataclass(frozen=True)
class Check:
    """One test of the file as a whole.

    Attributes:
        name: in one word or two.
        value: what was found; None where it could not be.
        bound: what it is held against.
        at_least: whether the value must be at least the bound; at most otherwise.
        passed: whether it keeps to it.
        says: what a failure means.
        fix: what to do about it.
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
    """A token that two files or transforms rank differently: mean ranks between 0 and 1, and mean values."""

    text: str
    count: int
    first: float
    second: float
    first_rank: float
    second_rank: float


@dataclass(frozen=True)
class Comparison:
    """Two transforms of the same scores, or the scores of two datasets, over the tokens that both have.

    Attributes:
        first: what is inspected.
        second: what it is compared with.
        of: `weights` or `scores`.
        agreement: share that both put on the same side of neutral, of the tokens that neither leaves at neutral.
        rank_correlation: Spearman's, over all tokens.
        within: the mean of Spearman's over responses.
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
    """Everything that is shown.

    Attributes:
        show: which value colours the tokens: `weights`, `scores` or `adjusted`.
        pairs: how many the split has.
        separation: None in a file of final weights.
        ranked_by: what `highest` and `lowest` are ranked by: `r`, `r after the steps` or `weight`.
        heaviest: tokens with the highest mean weight.
        lightest: … and with the lowest.
        scores: histogram of r, or of the weights in a file of final weights.
        sizes: histogram of the effective sample size of a response, as a share of its tokens.
        curves: by shown value and side, its mean by relative position.
        scales: by shown value, and by the name of each preview.
        notices: what to tell beside the view, skipped rows for example.
        views: the pairs that are shown, in the order asked for.
        previews: names of the transforms that the views show beside the one in use.
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
    views: list[PairView]
    previews: list[str]
    provenance: dict[str, Any]

    @property
    def scale(self) -> Scale:
        """The colour scale of the shown value."""
        return self.scales[self.show]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)
