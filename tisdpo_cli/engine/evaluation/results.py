"""What `evaluate` finds, as plain values: one model of the facts feeds the terminal and JSON.

Rewards of a preference are β log π/π_ref, in nats; those of responses are in the units of whoever gives them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class MeanWithError:
    """A mean that samples give, and its standard error (None where one sample says nothing about it)."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Interval:
    """A mean with a bootstrap confidence interval of 95 %."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """Responses of a policy against those of another one to the same prompts.

    Attributes:
        win_rate: with ties counted half.
        p_value: of the exact two-sided sign test, ties left out.
    """

    wins: int
    ties: int
    losses: int
    win_rate: float
    p_value: float


@dataclass(frozen=True)
class PairMetrics:
    """A policy on the responses of the dataset. Margins and rewards are implicit ones.

    Attributes:
        accuracy: share of pairs whose chosen response has the higher reward.
        ties: share of pairs with equal rewards; no success.
        kl_chosen: mean over the tokens of KL(policy ‖ reference), exact over the vocabulary.
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
    """A policy on responses of its own.

    Attributes:
        length: mean tokens, the EOS not counted.
        ended: share that the model ended itself, within the limit of new tokens.
        repetition: mean share of the 4-grams of a response that stood in it before.
        kl_per_token: of KL(policy ‖ reference), estimated: exact over the vocabulary at each position, positions
            sampled. None where the temperature is not 1, so that the samples are not the policy's.
        kl_per_response: the same for whole responses, up to the limit of new tokens.
        reward: mean reward, where something gives rewards.
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
    """Everything about one policy.

    Attributes:
        role: `model`, `baseline` or `reference`.
        pairs: None for the reference, which is 0 there by definition.
        samples: None where none were asked for.
        against_baseline: where there are a baseline and rewards.
    """

    role: str
    path: str
    pairs: PairMetrics | None
    samples: SampleMetrics | None
    against_baseline: WinRate | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        pairs: held-out pairs that were read.
        prompts: distinct prompts that were answered.
        policies: the models as they were given, then baseline and reference where they were sampled.
        reference_perplexity: of the reference, by side of the pairs.
        reward_at_baseline_kl: what the checkpoints earn where their KL is the baseline's, between the two next to it;
            None without several checkpoints, a baseline and rewards, or where no two lie around it.
        provenance: what it was made from.
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
        """The same as plain values for JSON."""
        return asdict(self)
