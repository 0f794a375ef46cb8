"""Signs that a preference training degenerates, found in its metrics: each is said once, with what it means.

Pure: it is given the lines of the metrics file, so that a resumed run finds the same from the lines that it keeps.

Thresholds. A policy that is 100 nats from its reference on a response is beyond the distances at which the quality of
its samples has been seen to fall (Gao et al. 2023, arXiv 2210.10760; Rafailov et al. 2024, arXiv 2406.02900). A margin
of 20 leaves a gradient of 2e-9. Log-probs of chosen responses often fall a little (Pal et al. 2024, arXiv 2402.13228;
Razin et al. 2024, arXiv 2410.08847): a tenth of their size and 10 nats is more than that. If 60 pairs in a row are told
apart, fewer than 5 % are not, with 95 % confidence; where that is so early, the rest widens margins without a bound
(Azar et al. 2024, arXiv 2310.12036).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

_WINDOW = 10
_FAR, _SATURATED = 100.0, 20.0
_FALL, _SHARE_OF_FALL = 10.0, 0.1
_PAIRS_IN_A_ROW, _EARLY = 60, 0.5


@dataclass(frozen=True)
class Finding:
    """A sign that was found.

    Attributes:
        name: of the sign.
        step: at which it was found.
        text: what it means, in a line.
    """

    name: str
    step: int
    text: str


@dataclass(frozen=True)
class HealthConfig:
    """What is known of a training.

    Attributes:
        beta: of the objective.
        batch_size: pairs per update.
        updates: number of updates.
    """

    beta: float
    batch_size: int
    updates: int


class Health:
    """Looks at the metrics of a preference training, step by step.

    Attributes:
        findings: what was found so far.
    """

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._recent: deque[Mapping[str, float]] = deque(maxlen=_WINDOW)
        self._told_apart = 0
        self.findings: list[Finding] = []

    def observe(self, record: Mapping[str, Any]) -> list[Finding]:
        """Take one line of metrics; returns what is new."""
        step = record["step"]
        if step == 0:
            return []
        self._recent.append(record)
        self._told_apart = self._told_apart + self._config.batch_size if record["rewards/accuracies"] == 1 else 0
        known, found = {finding.name for finding in self.findings}, []
        for name, look in _SIGNS.items():
            text = look(self) if name not in known else None
            if text is not None:
                found.append(Finding(name, step, f"{text} (step {step})"))
        self.findings += found
        return found

    def _mean(self, name: str) -> float | None:
        """Mean of a metric over the last steps; None before there are enough, or where it is not computed."""
        if len(self._recent) < _WINDOW or name not in self._recent[-1]:
            return None
        return fmean(record[name] for record in self._recent)

    def _chosen_falls(self) -> str | None:
        reward, logps, margin = (self._mean(name) for name in ("rewards/chosen", "logps/chosen", "rewards/margins"))
        if reward is None or logps is None or margin is None:
            return None
        fall = -reward / self._config.beta
        if fall < max(_FALL, _SHARE_OF_FALL * abs(logps + fall)) or margin <= 0:
            return None
        return (
            f"chosen responses have become less likely, by {fall:.0f} nats on average: the margin grows by pushing "
            "both responses down, and probability goes to other texts; raise --beta or lower --learning-rate"
        )

    def _told_apart_early(self) -> str | None:
        step, config = self._recent[-1]["step"], self._config
        if self._told_apart < _PAIRS_IN_A_ROW or step > _EARLY * config.updates:
            return None
        return (
            f"the last {self._told_apart} pairs were all told apart after {step / config.updates:.0%} of the training: "
            "the rest mostly widens margins that are right; check that neither length nor format tells them apart, "
            "or train for fewer steps"
        )

    def _far_away(self) -> str | None:
        for name in ("kl/chosen", "kl/rejected"):
            value = self._mean(name)
            if value is not None and value > _FAR:
                return self._far_text(f"{name} is {value:.0f} nats")
        for side in ("chosen", "rejected"):
            reward = self._mean(f"rewards/{side}")
            if reward is not None and abs(reward) / self._config.beta > _FAR:
                return self._far_text(f"log-ratios of {side} responses are {reward / self._config.beta:+.0f} nats")
        return None

    @staticmethod
    def _far_text(what: str) -> str:
        return (
            f"the policy is far from its reference, {what} on average: its samples are likely to be worse than its "
            "rewards say; raise --beta, lower --learning-rate, or stop earlier"
        )

    def _saturated(self) -> str | None:
        margin = self._mean("rewards/margins")
        if margin is None or margin < _SATURATED:
            return None
        return (
            f"margins are {margin:.0f} on average, where the loss of a pair is 0: almost nothing is learned any more, "
            "and pairs that are wrong or mislabelled dominate the gradient; lower --learning-rate or --epochs"
        )


_SIGNS: Mapping[str, Callable[[Health], str | None]] = {
    "chosen_falls": Health._chosen_falls,
    "told_apart_early": Health._told_apart_early,
    "far_from_reference": Health._far_away,
    "saturated": Health._saturated,
}
