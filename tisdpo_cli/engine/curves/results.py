"""The curves of several runs as plain values, behind the page and the JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[int, float]

# What is drawn, in this order: the metric, and its title. An evaluation has the same under `eval/`.
METRICS = {
    "loss": "Loss",
    "rewards/margins": "Reward margin",
    "weighted_rewards/margins": "Weighted reward margin",
    "rewards/accuracies": "Reward accuracy",
    "logps/chosen": "Log-prob of chosen responses (nats)",
    "logps/rejected": "Log-prob of rejected responses (nats)",
    "kl/chosen": "KL on chosen responses (nats)",
    "kl/rejected": "KL on rejected responses (nats)",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "pairs_per_second": "Pairs per second",
    "examples_per_second": "Examples per second",
    "tokens_per_second": "Tokens per second",
}


@dataclass(frozen=True)
class RunCurves:
    """One training.

    Attributes:
        name: its output directory, as given.
        command: that made it, or an empty text if its marker cannot be read.
        finished: whether it is complete; otherwise it runs or was interrupted.
        step: the last one.
        settings: in force, by dotted name.
        metrics: by step, one flat record each.
    """

    name: str
    command: str
    finished: bool
    step: int
    settings: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    def series(self, metric: str) -> list[Point]:
        """The finite values of a metric by step."""
        found = ((record["step"], record.get(metric)) for record in self.metrics)
        return [(step, float(value)) for step, value in found if value is not None and _is_finite(value)]

    def final(self) -> dict[str, float]:
        """The last value of every metric."""
        names = dict.fromkeys(name for record in self.metrics for name in record if name not in ("step", "epoch"))
        last = {name: self.series(name) for name in names}
        return {name: points[-1][1] for name, points in last.items() if points}

    @property
    def state(self) -> str:
        """Whether it is finished, in words."""
        return "finished" if self.finished else "in progress or interrupted"


@dataclass(frozen=True)
class RunComparison:
    """Several runs."""

    runs: Sequence[RunCurves]

    def drawn(self) -> dict[str, str]:
        """The metrics that any run has, with their titles."""
        return {
            metric: title
            for metric, title in METRICS.items()
            if any(run.series(metric) or run.series(f"eval/{metric}") for run in self.runs)
        }

    def settings(self) -> dict[str, list[Any]]:
        """The settings in which the runs differ, with the value of each run, or None where one has no such setting.

        Of a single run all of them.
        """
        names = dict.fromkeys(name for run in self.runs for name in run.settings)
        values = {name: [run.settings.get(name) for run in self.runs] for name in names}
        return {name: own for name, own in values.items() if len(own) == 1 or any(value != own[0] for value in own)}

    def final(self) -> dict[str, list[float | None]]:
        """The last value of every metric that any run has, of each run."""
        last = [run.final() for run in self.runs]
        names = dict.fromkeys(name for values in last for name in values)
        return {name: [values.get(name) for values in last] for name in names}

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        runs = [
            {
                "name": run.name,
                "command": run.command,
                "finished": run.finished,
                "step": run.step,
                "curves": _curves(run),
                "final": run.final(),
            }
            for run in self.runs
        ]
        return {"runs": runs, "settings": self.settings()}


def _curves(run: RunCurves) -> dict[str, list[Point]]:
    found = {name: run.series(name) for metric in METRICS for name in (metric, f"eval/{metric}")}
    return {name: points for name, points in found.items() if points}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: each the mean of as many that follow one another."""
    width = math.ceil(len(points) / most) if points else 1
    groups = (points[i : i + width] for i in range(0, len(points), width))
    return [(round(_mean(step for step, _ in group)), _mean(value for _, value in group)) for group in groups]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
