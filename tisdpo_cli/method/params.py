"""Parameters of registry entries: their defaults, bounds and help texts.

Pure data. Objectives, steps and transforms are dictionaries of entries with such parameters. The settings turn these
into options, so that a new entry gets its options, checks and help for free.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

Value = float | bool | str


@dataclass(frozen=True)
class Param:
    """A parameter: its default, help text and bounds.

    Attributes:
        default: a number, a flag or one of `choices`, which sets the type; None if it is off by default.
        help: description.
        above: exclusive lower bound.
        at_least: inclusive lower bound.
        under: exclusive upper bound.
        at_most: inclusive upper bound.
        below: name of another parameter of the same entry that must be greater.
        choices: allowed values, if it is not a number.
    """

    default: Value | None
    help: str
    above: float | None = None
    at_least: float | None = None
    under: float | None = None
    at_most: float | None = None
    below: str | None = None
    choices: tuple[str, ...] = ()


def resolve_params(entry: str, params: Mapping[str, Param], overrides: Mapping[str, Value]) -> dict[str, Value]:
    """Complete the parameters of an entry with their defaults, and check them.

    Args:
        entry: the entry's name in messages, such as `transform exp`.
        params: the entry's parameters.
        overrides: values that replace the defaults, by name.

    Returns:
        The value of every parameter that has one, by name.

    Raises:
        ValueError: a name that the entry does not have, or a value out of bounds.
    """
    unknown = [name for name in overrides if name not in params]
    if unknown:
        known = ", ".join(params) or "none"
        raise ValueError(f"{entry} has no parameter {', '.join(unknown)} (it has: {known})")
    values = {name: overrides.get(name, param.default) for name, param in params.items()}
    resolved = {name: value for name, value in values.items() if value is not None}
    for name, value in resolved.items():
        problem = bounds_problem(params[name], value, resolved)
        if problem:
            raise ValueError(f"{name} of {entry} must be {problem}")
    return resolved


def bounds_problem(param: Param, value: Value, others: Mapping[str, Value]) -> str | None:
    """Return which bound a value violates, such as `above 0, not -1`, or None."""
    if param.choices:
        return None if value in param.choices else f"one of {', '.join(param.choices)}, not {value}"
    number = float(value)
    if not math.isfinite(number):
        return f"a finite number, not {value}"
    bounds = (
        ("above", param.above, operator.gt),
        ("at least", param.at_least, operator.ge),
        ("below", param.under, operator.lt),
        ("at most", param.at_most, operator.le),
    )
    for words, bound, holds in bounds:
        if bound is not None and not holds(number, bound):
            return f"{words} {bound:g}, not {number:g}"
    if param.below is not None and number >= float(others[param.below]):
        return f"below {param.below} ({others[param.below]:g})"
    return None


def describe_params(values: Mapping[str, Value]) -> str:
    """Describe values as `min_scale 0.7, max_scale 1.3`; a flag that is set appears as its name."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words += [name] if value else []
        else:
            words.append(f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {value}")
    return ", ".join(words)
