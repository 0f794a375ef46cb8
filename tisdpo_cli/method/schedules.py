"""Learning-rate schedules: from the number of an update to its learning rate.

Pure maths without state, so that a resumed run needs nothing but the step. After the warm-up they are the schedules of
transformers' `get_scheduler`; those that follow metrics are none of these. A new schedule is one function and one entry
in `SCHEDULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tisdpo_cli.method.params import Param, Value, resolve_params


@dataclass(frozen=True)
class Span:
    """The length of a training and the learning rate of its schedule.

    Attributes:
        base: peak learning rate.
        warmup: number of warm-up steps.
        updates: number of updates, warm-up included.
    """

    base: float
    warmup: int
    updates: int

    def done(self, step: float) -> float:
        """The share of the updates after the warm-up that come before one."""
        return (step - self.warmup) / max(1, self.updates - self.warmup)


Factor = Callable[[int, Span, Mapping[str, Any]], float]


def _linear_warmup(step: int, span: Span, _: Mapping[str, Any]) -> float:
    """Starts above zero, as in the authors' code."""
    return (step + 1) / (span.warmup + 1)


@dataclass(frozen=True)
class LrSchedule:
    """One schedule.

    Attributes:
        factor: maps an update after the warm-up (0 is the first of all), the span and the parameters to the share of
            the peak learning rate.
        help: description.
        params: parameters by name.
        one_of: parameters of which exactly one must be given.
        warmup: the same as `factor` during the warm-up.
    """

    factor: Factor
    help: str
    params: Mapping[str, Param] = field(default_factory=dict)
    one_of: tuple[str, ...] = ()
    warmup: Factor = _linear_warmup


def _constant(_step: int, _span: Span, _: Mapping[str, Any]) -> float:
    return 1.0


def _linear(step: int, span: Span, _: Mapping[str, Any]) -> float:
    return 1 - span.done(step)


def _waves(done: float, cycles: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * cycles * 2.0 * done))


def _cosine(step: int, span: Span, p: Mapping[str, Any]) -> float:
    return _waves(span.done(step), p["num_cycles"])


def _cosine_with_restarts(step: int, span: Span, p: Mapping[str, Any]) -> float:
    done = span.done(step)
    return 0.0 if done >= 1 else 0.5 * (1 + math.cos(math.pi * (p["num_cycles"] * done % 1.0)))


def _polynomial(step: int, span: Span, p: Mapping[str, Any]) -> float:
    end = p["lr_end"]
    return ((span.base - end) * max(0.0, 1 - span.done(step)) ** p["power"] + end) / span.base


def _inverse_sqrt(step: int, span: Span, p: Mapping[str, Any]) -> float:
    timescale = p.get("timescale") or span.warmup or 10_000
    return 1 / math.sqrt((step + timescale - span.warmup) / timescale)


def _lowest(span: Span, p: Mapping[str, Any]) -> float:
    """The lowest share of the peak learning rate."""
    return p["min_lr"] / span.base if "min_lr" in p else p["min_lr_rate"]


def _cosine_with_min_lr(step: int, span: Span, p: Mapping[str, Any]) -> float:
    lowest = _lowest(span, p)
    return _waves(span.done(step), p["num_cycles"]) * (1 - lowest) + lowest


def _cosine_warmup_with_min_lr(step: int, span: Span, p: Mapping[str, Any]) -> float:
    lowest = _lowest(span, p)
    return _waves(span.done(step + 1), p["num_cycles"]) * (1 - lowest) + lowest


def _warmup_from(step: int, span: Span, p: Mapping[str, Any]) -> float:
    start = p.get("warmup_lr_rate")
    if start is None:
        return (step + 1) / max(1, span.warmup)
    return start + (1 - start) * step / max(1, span.warmup - 1)


def _falling(shape: str, done: float, cycles: float) -> float:
    if shape == "linear":
        return 1 - done
    return _waves(done, cycles) if shape == "cosine" else 1 - math.sqrt(done)


def _stable_decay(step: int, span: Span, p: Mapping[str, Any]) -> float:
    stable = p.get("num_stable_steps", span.updates - span.warmup - p["num_decay_steps"])
    decaying, lowest = step - span.warmup - stable, p["min_lr_ratio"]
    if decaying < 0:
        return 1.0
    if decaying >= p["num_decay_steps"]:
        return lowest
    return _falling(p["decay_type"], decaying / p["num_decay_steps"], p["num_cycles"]) * (1 - lowest) + lowest


def _stable_warmup(step: int, span: Span, p: Mapping[str, Any]) -> float:
    done, shape = (step + 1) / (span.warmup + 1), p["warmup_type"]
    if shape == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    elif shape == "1-sqrt":
        done = 1 - math.sqrt(1 - done)
    return done * (1 - p["min_lr_ratio"]) + p["min_lr_ratio"]


def _cycles(default: float) -> dict[str, Param]:
    return {"num_cycles": Param(default, "number of waves", above=0)}


_SHAPES = ("linear", "cosine", "1-sqrt")
_MIN_LR = {
    "min_lr": Param(None, "lowest learning rate", at_least=0),
    "min_lr_rate": Param(None, "lowest learning rate, as a share of the peak", at_least=0, at_most=1),
}
_STEPS_OF_DECAY = {
    "num_decay_steps": Param(None, "number of steps of the decay", at_least=1),
    "num_stable_steps": Param(None, "number of steps before the decay", at_least=0),
    "min_lr_ratio": Param(0.0, "lowest learning rate, as a share of the peak", at_least=0, at_most=1),
    "warmup_type": Param("linear", "shape of the warm-up", choices=_SHAPES),
    "decay_type": Param("cosine", "shape of the decay", choices=_SHAPES),
}

SCHEDULES: Mapping[str, LrSchedule] = {
    "constant": LrSchedule(_constant, "the peak to the end"),
    "linear": LrSchedule(_linear, "falls to 0"),
    "cosine": LrSchedule(_cosine, "falls to 0 like a cosine", _cycles(0.5)),
    "cosine_with_restarts": LrSchedule(_cosine_with_restarts, "several falls to 0", _cycles(1.0)),
    "polynomial": LrSchedule(
        _polynomial,
        "falls like a power",
        {"lr_end": Param(1e-7, "last learning rate", at_least=0), "power": Param(1.0, "the power", above=0)},
    ),
    "inverse_sqrt": LrSchedule(
        _inverse_sqrt,
        "falls like 1/√step",
        {"timescale": Param(None, "steps of the scale (default: those of the warm-up, or 10000)", above=0)},
    ),
    "cosine_with_min_lr": LrSchedule(
        _cosine_with_min_lr, "falls to a minimum", {**_MIN_LR, **_cycles(0.5)}, ("min_lr", "min_lr_rate")
    ),
    "cosine_warmup_with_min_lr": LrSchedule(
        _cosine_warmup_with_min_lr,
        "falls to a minimum, with a warm-up that may start anywhere",
        {
            **_MIN_LR,
            **_cycles(0.5),
            "warmup_lr_rate": Param(None, "first learning rate, as a share of the peak", at_least=0, at_most=1),
        },
        ("min_lr", "min_lr_rate"),
        _warmup_from,
    ),
    "warmup_stable_decay": LrSchedule(
        _stable_decay,
        "the peak, then a fall",
        {**_STEPS_OF_DECAY, **_cycles(0.5)},
        ("num_decay_steps",),
        _stable_warmup,
    ),
}
# Parameters that are learning rates, which are below the peak.
_RATES = ("lr_end", "min_lr")


def resolve_schedule(name: str, given: Mapping[str, Value], peak: float | None) -> dict[str, Value]:
    """The parameters of a schedule, completed and checked.

    Args:
        name: of the schedule.
        given: parameters by name; numbers may be text.
        peak: the learning rate, if it is known.

    Raises:
        ValueError: one does not exist, is missing, or is out of bounds.
    """
    schedule, where = SCHEDULES[name], f"lr_scheduler {name}"
    params = {key: _value(schedule.params.get(key), value, f"{key} of {where}") for key, value in given.items()}
    resolved = resolve_params(where, schedule.params, params)
    if schedule.one_of and sum(key in resolved for key in schedule.one_of) != 1:
        needed = " or ".join(schedule.one_of)
        example = f'{{"{schedule.one_of[-1]}": {10 if "steps" in needed else 0.1}}}'
        raise ValueError(f"{where} needs {needed}: lr_scheduler_kwargs '{example}'")
    for key in _RATES:
        if peak is not None and key in resolved and float(resolved[key]) >= peak:
            raise ValueError(f"{key} of {where} must be below the learning rate, {peak:g}, not {resolved[key]:g}")
    return resolved


def _value(param: Param | None, value: Any, where: str) -> Value:
    if param is None or param.choices:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a number") from None


def learning_rate(
    step: int, base: float, warmup: int, updates: int, schedule: str, params: Mapping[str, Value] | None = None
) -> float:
    """The learning rate of an update (0 is the first).

    Args:
        step: the update.
        base: peak learning rate.
        warmup: number of warm-up steps.
        updates: number of updates, warm-up included.
        schedule: its name.
        params: of the schedule, resolved; by default its own defaults.
    """
    entry, span = SCHEDULES[schedule], Span(base, warmup, updates)
    resolved = params or resolve_schedule(schedule, {}, None)
    factor = entry.warmup if step < warmup else entry.factor
    return base * max(0.0, factor(step, span, resolved))
