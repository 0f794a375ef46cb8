"""The evaluation of a training, and what follows from it: which step is the best, and whether to go on.

Pure: it gets the metrics of evaluations. What it knows is a few numbers, which a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tisdpo_cli.engine.training.task import Task
from tisdpo_cli.errors import UsageError


@dataclass(frozen=True)
class BestConfig:
    """What is done about the best evaluation.

    Attributes:
        metric: that decides, without `eval/`.
        greater_is_better: whether a greater value is better.
        patience: evaluations without improvement after which the training stops, or None.
        threshold: by how much a value must be better to count as an improvement.
        load: whether the result is the model of the best evaluation rather than of the last step.
    """

    metric: str
    greater_is_better: bool
    patience: int | None
    threshold: float
    load: bool


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, how often, and what follows from it."""

    task: Task
    every: int | None
    batch_size: int
    best: BestConfig | None = None


class BestEvaluation:
    """The best evaluation so far.

    Attributes:
        step: of the best one, or None before the first.
        value: of the metric there.
    """

    def __init__(self, config: BestConfig | None) -> None:
        self._config = config
        self.step: int | None = None
        self.value = 0.0
        self._waited = 0

    @property
    def loads(self) -> bool:
        """Whether the model of the best evaluation is the result."""
        return self._config is not None and self._config.load

    @property
    def stops(self) -> bool:
        """Whether the training should stop."""
        patience = self._config.patience if self._config is not None else None
        return patience is not None and self._waited >= patience

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take an evaluation after an update; returns whether it is the best so far."""
        if self._config is None:
            return False
        value = metrics[f"eval/{self._config.metric}"]
        gain = (value - self.value) * (1 if self._config.greater_is_better else -1)
        first = self.step is None
        improved = first or gain > 0
        self._waited = 0 if first or gain > self._config.threshold else self._waited + 1
        if improved:
            self.step, self.value = step, value
        return improved

    def forget(self) -> None:
        """Take the next evaluation for the best, as the first one."""
        self.step = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {} if self._config is None else {"step": self.step, "value": self.value, "waited": self._waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state from `state`."""
        if self._config is not None and state:
            self.step, self.value, self._waited = state["step"], state["value"], state["waited"]

    def summary(self) -> dict[str, Any]:
        """The best evaluation as it is recorded, if there is one."""
        if self._config is None or self.step is None:
            return {}
        return {"best": {"step": self.step, "metric": f"eval/{self._config.metric}", "value": self.value}}


def check_best(config: BestConfig | None, task: Task | None) -> None:
    """Refuse a metric that is not evaluated.

    Raises:
        UsageError: there is nothing to evaluate, or not this metric.
    """
    if config is None:
        return
    if task is None:
        option = "--early-stopping-patience" if config.patience is not None else "--load-best"
        raise UsageError("there is no test split to evaluate", where=option, fix="give --eval-size, or leave it out")
    if config.metric not in task.metrics:
        names = ", ".join(task.metrics)
        raise UsageError("not evaluated here", where=f"--metric-for-best {config.metric}", fix=f"use one of {names}")
