"""The group of settings of an optimizer, its schedule, and the length of a training."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tisdpo_cli.method.schedules import SCHEDULES, resolve_schedule
from tisdpo_cli.settings.fields import (
    Group,
    JsonObject,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    setting,
)

# The batch size if neither it nor its factors are given.
DEFAULT_BATCH_SIZE = 32

# Names of optimizers in transformers.
_OTHER_NAMES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw8bit"),
    "paged_adamw_8bit": "paged_adamw8bit",
}
_Optimizers = Literal[
    "rmsprop", "adamw", "adam", "sgd", "adafactor", "adagrad", "adamax", "nadam", "radam", "adamw8bit",
    "paged_adamw8bit",
]  # fmt: skip
Optimizer = Annotated[
    _Optimizers,
    BeforeValidator(lambda given: _OTHER_NAMES.get(given, given) if isinstance(given, str) else given),
]
_ADAMS = ("adamw", "adam", "adamax", "nadam", "radam", "adamw8bit", "paged_adamw8bit")
# Parameters of optimizers: their defaults, and the optimizers that have them.
_OPTIMIZER_PARAMS = {
    "adam_beta1": (0.9, _ADAMS),
    "adam_beta2": (0.999, _ADAMS),
    "adam_epsilon": (1e-8, _ADAMS),
    "momentum": (0.0, ("sgd", "rmsprop")),
}
_WITHOUT_DECAY = ("norm", "bias")
Decay = Annotated[float, Field(ge=0, lt=1)]


def _steps_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a number of steps, or a share below 1")
    return int(value) if value >= 1 or value == 0 else value


def _schedule_name(given: Any) -> Any:
    if given in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(f"{given} follows a metric; only schedules that depend on the step alone are supported")
    # Every schedule has a warm-up here.
    return "constant" if given == "constant_with_warmup" else given


def _schedule_help() -> str:
    parts = (f"{name}: {', '.join(entry.params)}" for name, entry in SCHEDULES.items() if entry.params)
    return f"parameters of the schedule, as a JSON object ({'; '.join(parts)})"


class Optim(Group):
    """The optimizer, its schedule, and the length of the training."""

    optimizer: Optimizer = setting("rmsprop", "optimizer", "Optimization", "--optim")
    learning_rate: PositiveFloat = setting(5e-7, "peak learning rate", "Optimization", "--lr")
    lr_scheduler: Annotated[Literal[tuple(SCHEDULES)], BeforeValidator(_schedule_name)] = setting(  # type: ignore[valid-type]
        "constant",
        f"learning-rate schedule after warm-up: {', '.join(SCHEDULES)}",
        "Optimization",
        "--lr-scheduler-type",
    )
    lr_scheduler_kwargs: JsonObject | None = setting(None, _schedule_help(), "Optimization", metavar="JSON")
    warmup_steps: Annotated[NonNegativeFloat, AfterValidator(_steps_or_share)] = setting(
        150, "number of linear warm-up steps, or a share of all steps (below 1, rounded up)", "Optimization",
        metavar="N|SHARE",
    )  # fmt: skip
    adam_beta1: Decay | None = setting(None, "decay of the mean of gradients in Adam (default: 0.9)", "Optimization")
    adam_beta2: Decay | None = setting(
        None, "decay of the mean of squared gradients in Adam (default: 0.999)", "Optimization"
    )
    adam_epsilon: PositiveFloat | None = setting(
        None, "term that keeps the divisor in Adam above zero (default: 1e-8)", "Optimization"
    )
    momentum: Decay | None = setting(None, "momentum of sgd and rmsprop (default: 0)", "Optimization")
    weight_decay: NonNegativeFloat = setting(0.0, "weight decay", "Optimization")
    no_decay: str | None = setting(
        None, "parameters without weight decay: norm, bias, or both with a comma", "Optimization", metavar="NAMES"
    )
    max_grad_norm: PositiveFloat = setting(10.0, "clip the gradient norm to this value", "Optimization")
    epochs: PositiveFloat = setting(1.0, "passes over the data", "Optimization", "--num-train-epochs")
    max_steps: PositiveInt | None = setting(
        None, "number of optimizer steps; overrides --epochs and repeats the data if needed", "Optimization"
    )
    batch_size: PositiveInt | None = setting(
        None, f"pairs per optimizer step, over all processes (default: {DEFAULT_BATCH_SIZE})", "Optimization"
    )

    def schedule_params(self, peak: float | None) -> dict[str, Any]:
        """The parameters of the schedule in force, under a peak learning rate if it is known.

        Raises:
            ValueError: they do not fit.
        """
        return resolve_schedule(self.lr_scheduler, _json_object(self.lr_scheduler_kwargs), peak)

    def optimizer_params(self) -> dict[str, float]:
        """The given parameters of the optimizer."""
        return {name: value for name in _OPTIMIZER_PARAMS if (value := getattr(self, name)) is not None}

    def without_decay(self) -> tuple[str, ...]:
        """Kinds of parameters without weight decay, in order."""
        return tuple(sorted(set((self.no_decay or "").replace(",", " ").split())))

    def in_force(self) -> dict[str, Any]:
        """The settings, with parameters of schedule and optimizer only where they are not the defaults."""
        defaults = SCHEDULES[self.lr_scheduler].params
        params = self.schedule_params(None)
        changed = {name: value for name, value in params.items() if value != defaults[name].default}
        given = self.optimizer_params()
        own = {
            name: given[name] if given.get(name, default) != default else None
            for name, (default, _) in _OPTIMIZER_PARAMS.items()
        }
        no_decay = ",".join(self.without_decay()) or None
        return {**super().in_force(), **own, "no_decay": no_decay, "lr_scheduler_kwargs": changed or None}

    @model_validator(mode="after")
    def _optimizer_takes_the_parameters(self) -> Optim:
        for name in self.optimizer_params():
            _, users = _OPTIMIZER_PARAMS[name]
            if self.optimizer not in users:
                raise ValueError(f"optimizer {self.optimizer} has no {name} ({', '.join(users)} have it)")
        unknown = [name for name in self.without_decay() if name not in _WITHOUT_DECAY]
        if unknown:
            raise ValueError(f"no_decay: unknown {unknown[0]!r}; use {' or '.join(_WITHOUT_DECAY)}")
        if self.without_decay() and not self.weight_decay:
            raise ValueError("no_decay has no effect without weight_decay")
        return self

    @model_validator(mode="after")
    def _makes_a_schedule(self) -> Optim:
        self.schedule_params(self.learning_rate)
        return self


class SftOptim(Optim):
    """The optimizer of train-sft. The default learning rate depends on whether the model is new."""

    optimizer: Optimizer = setting("adamw", "optimizer", "Optimization", "--optim")
    learning_rate: PositiveFloat | None = setting(  # type: ignore[assignment]
        None, "peak learning rate (default: 2e-5; 3e-3 with --init)", "Optimization", "--lr"
    )
    batch_size: PositiveInt | None = setting(
        None, f"examples per optimizer step, over all processes (default: {DEFAULT_BATCH_SIZE})", "Optimization"
    )


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("lr_scheduler_kwargs must be a JSON object")
    return found
