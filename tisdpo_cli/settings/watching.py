"""The groups of settings that watch a training: its evaluation with what follows from it, and trackers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from tisdpo_cli.settings.fields import Group, NonNegativeFloat, NonNegativeInt, PathText, PositiveInt, setting

_REWARDS = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies"))
# What trainings evaluate: preferences and examples.
EVALUATED = (
    "loss", *_REWARDS, *(f"weighted_{name}" for name in _REWARDS), "logps/chosen", "logps/rejected", "kl/chosen",
    "kl/rejected", "kl/margins", "token_probability",
)  # fmt: skip


def _metric(value: Any) -> Any:
    """`eval/loss`, `eval_loss` and `loss` are one metric."""
    return value.removeprefix("eval/").removeprefix("eval_") if isinstance(value, str) else value


class Evaluation(Group):
    """Evaluation on the test split, and what follows from it."""

    eval_every: PositiveInt | None = setting(
        None, "evaluate every N steps, in addition to before and after training", "Evaluation", "--eval-steps"
    )
    eval_pairs: NonNegativeInt = setting(
        256, "number of test pairs to evaluate, from the start of the split (0 disables evaluation)", "Evaluation"
    )
    eval_batch_size: PositiveInt = setting(
        8, "pairs per forward pass on each process", "Evaluation", "--per-device-eval-batch-size"
    )
    metric_for_best: Annotated[str, BeforeValidator(_metric)] | None = setting(
        None,
        "evaluated metric that decides which step is best, such as loss or rewards/accuracies (default: loss)",
        "Evaluation",
        "--metric-for-best-model",
        metavar="NAME",
    )
    greater_is_better: Annotated[
        Literal["auto", "true", "false"],
        BeforeValidator(lambda given: str(given).lower() if isinstance(given, bool | str) else given),
    ] = setting("auto", "whether a greater value of that metric is better (auto: not of loss and kl)", "Evaluation")
    early_stopping_patience: PositiveInt | None = setting(
        None, "stop after this many evaluations without improvement", "Evaluation"
    )
    early_stopping_threshold: NonNegativeFloat | None = setting(
        None, "smallest change of the metric that counts as an improvement (default: 0)", "Evaluation"
    )
    load_best: bool = setting(
        False,
        "save the model of the best evaluation, not of the last step; its checkpoint is kept",
        "Evaluation",
        "--load-best-model-at-end",
    )

    sample_every: PositiveInt | None = setting(
        None,
        "write the model's responses to some evaluation prompts to samples.jsonl, every N steps",
        "Samples",
        shapes_result=False,
    )
    sample_prompts: PositiveInt = setting(4, "number of prompts to respond to", "Samples", shapes_result=False)
    sample_tokens: PositiveInt = setting(128, "maximum tokens of such a response", "Samples", shapes_result=False)
    sample_temperature: NonNegativeFloat = setting(
        0.0, "sampling temperature of such a response (0 = greedy)", "Samples", shapes_result=False
    )

    def best_metric(self) -> str:
        """The metric that decides which step is best."""
        return self.metric_for_best or "loss"

    def greater(self) -> bool:
        """Whether a greater value of it is better."""
        if self.greater_is_better == "auto":
            return self.best_metric() != "loss" and not self.best_metric().startswith("kl/")
        return self.greater_is_better == "true"

    @property
    def watches(self) -> bool:
        """Whether anything follows from the evaluations."""
        return self.load_best or self.early_stopping_patience is not None

    def in_force(self) -> dict[str, Any]:
        """The settings; those that nothing follows from are left unset."""
        unset: dict[str, Any] = {"greater_is_better": None, "load_best": self.load_best or None}
        if self.watches:
            unset |= {"metric_for_best": self.best_metric(), "greater_is_better": self.greater()}
        return {**super().in_force(), **unset, "early_stopping_threshold": self.early_stopping_threshold or None}

    @model_validator(mode="after")
    def _has_something_to_watch(self) -> Evaluation:
        names = ("metric_for_best", "greater_is_better", "early_stopping_threshold")
        given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if given and not self.watches:
            raise ValueError(f"{given[0]} has no effect without early_stopping_patience or load_best")
        if self.early_stopping_threshold is not None and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold has no effect without early_stopping_patience")
        if self.best_metric() not in EVALUATED:
            raise ValueError(f"metric_for_best must be one of {', '.join(EVALUATED)}")
        if self.watches and (self.eval_every is None or not self.eval_pairs):
            option = "load_best" if self.load_best else "early_stopping_patience"
            raise ValueError(f"{option} needs evaluations: set eval_every, and eval_pairs above 0")
        return self


TRACKER_NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


def _joined(value: Any) -> Any:
    """In a file trackers may be a list, and nothing is none."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value) or "none"
    return "none" if value is None else value


class Tracking(Group):
    """Trackers of experiments, none unless asked for."""

    report_to: Annotated[str, BeforeValidator(_joined)] = setting(
        "none",
        f"send the metrics to trackers: {', '.join(TRACKER_NAMES)}; several with commas",
        "Tracking",
        shapes_result=False,
        metavar="NAMES",
    )
    run_name: PathText | None = setting(
        None, "name of the run in trackers (default: that of the output directory)", "Tracking", shapes_result=False,
        repeated=False, metavar="NAME",
    )  # fmt: skip
    tracker_project: PathText = setting(
        "tisdpo", "project or experiment in trackers", "Tracking", "--project", shapes_result=False, metavar="NAME"
    )

    def names(self) -> tuple[str, ...]:
        """The trackers, each once."""
        return tuple(dict.fromkeys(name for name in self.report_to.replace(",", " ").split() if name != "none"))

    @field_validator("report_to")
    @classmethod
    def _knows_the_trackers(cls, value: str) -> str:
        for name in value.replace(",", " ").split():
            if name not in (*TRACKER_NAMES, "none"):
                raise ValueError(f"unknown tracker {name!r}; use {', '.join(TRACKER_NAMES)} or none")
        return value
