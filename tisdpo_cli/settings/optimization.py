"""The group of settings of an optimizer, its schedule, and the length of a training."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from tisdpo_cli.method.schedules import SCHEDULES, resolve_schedule
from tisdpo_cli.settings.fields import (
    Group,
    JsonObject,
    NonNegativeFloat,
    NonNegativeInt,
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
Optimizer = Annotated[
    Literal["rmsprop", "adamw", "adam", "sgd", "adamw8bit", "paged_adamw8bit"],
    BeforeValidator(lambda given: _OTHER_NAMES.get(given, given) if isinstance(given, str) else given),
]


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
    warmup_steps: NonNegativeInt = setting(150, "number of linear warm-up steps", "Optimization")
    weight_decay: NonNegativeFloat = setting(0.0, "weight decay", "Optimization")
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

    def in_force(self) -> dict[str, Any]:
        """The settings with the parameters of the schedule that are not its defaults."""
        defaults = SCHEDULES[self.lr_scheduler].params
        params = self.schedule_params(None)
        changed = {name: value for name, value in params.items() if value != defaults[name].default}
        return {**super().in_force(), "lr_scheduler_kwargs": changed or None}

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
