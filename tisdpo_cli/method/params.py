"""Parameters of a method that has a name: their defaults, bounds and help, for every registry of the program.

Pure data. The registries (objectives, steps, transforms) are dictionaries of entries with such parameters; the
settings make options of them, so that a new entry has its options, checks and help at once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

Value = float | bool | str


@dataclass(frozen=True)
class Param:
    """A parameter: its default, what it means, and what its value must keep to.

    Attributes:
        default: also says the type: a number, a flag, or one of `choices`. None where it is off unless given.
        above: the value must be greater than this.
        at_least: … or equal to this.
        under: the value must be less than this.
        at_most: … or equal to this.
        below: the name of another parameter of the same entry that must be greater.
        choices: the values it may have, where it is no number.
    """

    default: Value | None
    help: str
    above: float | None = None
    at_least: float | None = None
    under: float | None = None
    at_most: float | None = None
    below: str | None = None
    choices: tuple[str, ...] = ()


def resolve_params(what: str, params: Mapping[str, Param], given: Mapping[str, Value]) -> dict[str, Value]:
    """Values of all parameters of an entry: those given, over the defaults.

    Args:
        what: the entry's name in messages, `transform exp`.
        params: its parameters.
        given: values by name.

    Raises:
        ValueError: a name that the entry does not have, or a value out of bounds.
    """
    strangers = [name for name in given if name not in params]
    if strangers:
        has = ", ".join(params) or "none"
        raise ValueError(f"{what} has no parameter {', '.join(strangers)} (it has: {has})")
    values = {name: given.get(name, param.default) for name, param in params.items()}
    known = {name: value for name, value in values.items() if value is not None}
    for name, value in known.items():
        fault = bounds_problem(params[name], value, known)
        if fault:
            raise ValueError(f"{name} of {what} must be {fault}")
    return known


def bounds_problem(param: Param, value: Value, others: Mapping[str, Value]) -> str | None:
    """What a value must be and is not, or None: `above 0, not -1`."""
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
    """`min_scale 0.7, max_scale 1.3`; a flag that is set by its name alone."""
    said = []
    for name, value in values.items():
        if isinstance(value, bool):
            said += [name] if value else []
        else:
            said.append(f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {value}")
    return ", ".join(said)
