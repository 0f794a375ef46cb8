"""Results of evaluate as plain values: one model behind the terminal view and JSON.

Rewards of preference pairs are implicit, β log π/π_ref in nats; rewards of samples have the unit of their source. The
field names are the keys of `evaluate --json`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class MeanWithError:
    """A sample mean and its standard error, which is None for a single sample."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """Responses of one policy compared with those of another to the same prompts.

    Attributes:
        win_rate: share of wins; ties count half.
        p_value: of the exact two-sided sign test, without ties.
    """

    wins: int
    ties: int
    losses: int
    win_rate: float
    p_value: float


@dataclass(frozen=True)
class PairMetrics:
    """A policy on the preference pairs of the dataset. Rewards and margins are implicit.

    Attributes:
        accuracy: share of pairs whose chosen response has the higher reward.
        ties: share of pairs with equal rewards; they do not count as correct.
        margin: reward of chosen minus reward of rejected.
        kl_chosen: mean over tokens of KL(policy ‖ reference), exact over the vocabulary.
        perplexity_chosen: exp of the mean negative log-prob of a token.
    """

    accuracy: float
    ties: float
    margin: MeanWithError
    reward_chosen: float
    reward_rejected: float
    kl_chosen: float
    kl_rejected: float
    perplexity_chosen: float
    perplexity_rejected: float


@dataclass(frozen=True)
class SampleMetrics:
    """A policy on responses that it generated.

    Attributes:
        length: mean number of tokens, without the EOS.
        ended: share of responses that end with an EOS within the limit of new tokens.
        repetition: mean share of repeated 4-grams in a response.
        kl_per_token: estimate of KL(policy ‖ reference): exact over the vocabulary at each position, positions sampled.
            None if the temperature is not 1, because the samples are then not from the policy.
        kl_per_response: the same, summed over a response, up to the limit of new tokens.
        reward: mean reward, or None without a reward source.
    """

    samples: int
    length: float
    ended: float
    repetition: float
    kl_per_token: MeanWithError | None
    kl_per_response: MeanWithError | None
    reward: Interval | None


@dataclass(frozen=True)
class PolicyMetrics:
    """All metrics of one policy.

    Attributes:
        role: `model`, `baseline` or `reference`.
        path: as given by the user.
        pairs: None for the reference, whose implicit rewards are 0 by definition.
        samples: None without sampled responses.
        against_baseline: None without a baseline or without rewards.
    """

    role: str
    path: str
    pairs: PairMetrics | None
    samples: SampleMetrics | None
    against_baseline: WinRate | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything that evaluate reports.

    Attributes:
        pairs: number of evaluated pairs.
        prompts: number of distinct prompts with generated responses.
        policies: the models in the given order, then the baseline, then the reference if it was sampled.
        reference_perplexity: of the reference, by side of the pairs.
        reward_at_baseline_kl: reward of the checkpoints at the KL of the baseline, interpolated between the two closest
            ones. None without several checkpoints, a baseline and rewards, or if the KL is out of their range.
        provenance: models, data, settings, versions.
    """

    dataset: str
    split: str
    pairs: int
    prompts: int
    policies: list[PolicyMetrics]
    reference_perplexity: dict[str, float]
    reward_at_baseline_kl: float | None
    provenance: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
