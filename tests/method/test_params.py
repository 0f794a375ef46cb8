"""Parameters of the registries: defaults, each bound on both of its sides, messages, descriptions, and every entry."""

import itertools
import math
import re
from dataclasses import FrozenInstanceError

import pytest

from tisdpo_cli.method.objectives import OBJECTIVES
from tisdpo_cli.method.params import Param, bounds_problem, describe_params, resolve_params
from tisdpo_cli.method.steps import STEPS
from tisdpo_cli.method.transforms import TRANSFORMS

REGISTRIES = {
    **{f"transform {name}": entry.params for name, entry in TRANSFORMS.items()},
    **{f"loss {name}": entry.params for name, entry in OBJECTIVES.items()},
    "steps": {name: step.param for name, step in STEPS.items()},
}
BOUNDS = {"above": 0.5, "at_least": 0.5, "under": 0.5, "at_most": 0.5}
# The next floats to a half, and which of (below, equal, above) each bound admits.
NEAR = (math.nextafter(0.5, 0), 0.5, math.nextafter(0.5, 1))
ADMITS = {
    "above": (False, False, True),
    "at_least": (False, True, True),
    "under": (True, False, False),
    "at_most": (True, True, False),
}


# ---------------------------------------------------------------- defaults


def test_parameters_that_are_given_win_over_defaults():
    known = {"a": Param(1.0, "a", above=0.0), "b": Param(None, "b"), "c": Param(False, "c")}
    assert resolve_params("x", known, {}) == {"a": 1.0, "c": False}
    assert resolve_params("x", known, {"a": 2.0, "b": 3.0}) == {"a": 2.0, "b": 3.0, "c": False}
    assert resolve_params("x", known, {"c": True}) == {"a": 1.0, "c": True}


def test_values_come_in_the_order_of_the_entry_whatever_was_given_first():
    known = {name: Param(1.0, name) for name in "dacb"}
    for order in itertools.permutations("abcd"):
        assert list(resolve_params("x", known, dict.fromkeys(order, 2.0))) == list("dacb")


def test_what_is_given_is_left_as_it_was():
    given = {"a": 2.0}
    made = resolve_params("x", {"a": Param(1.0, ""), "b": Param(3.0, "")}, given)
    made["a"] = 9.0
    assert given == {"a": 2.0}


def test_an_entry_without_parameters_has_no_values():
    assert resolve_params("x", {}, {}) == {}


def test_falsy_values_are_values():
    known = {"zero": Param(1.0, ""), "off": Param(True, "")}
    assert resolve_params("x", known, {"zero": 0.0, "off": False}) == {"zero": 0.0, "off": False}


def test_a_parameter_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Param(1.0, "").default = 2.0


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("bound", BOUNDS)
def test_each_bound_holds_to_the_last_bit(bound):
    param = Param(None, "", **{bound: BOUNDS[bound]})
    assert tuple(bounds_problem(param, value, {}) is None for value in NEAR) == ADMITS[bound]


def test_bounds_at_zero_are_bounds():
    for bound, refused in (("above", 0.0), ("at_least", -1e-9), ("under", 0.0), ("at_most", 1e-9)):
        assert bounds_problem(Param(None, "", **{bound: 0.0}), refused, {})
    assert bounds_problem(Param(None, "", above=0.0), -0.0, {})


def test_a_range_has_both_ends():
    param = Param(0.5, "", above=0.0, under=1.0)
    for value in (-1.0, 0.0, 1.0, 2.0):
        assert bounds_problem(param, value, {})
    for value in (1e-300, 0.5, math.nextafter(1, 0)):
        assert bounds_problem(param, value, {}) is None


def test_without_bounds_every_finite_number_will_do():
    for value in (-1e300, -1.0, 0, 5e-324, 1e300):
        assert bounds_problem(Param(1.0, ""), value, {}) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bounds", [{}, {"above": 0.0}, {"at_most": 1.0}, {"below": "other"}])
def test_numbers_that_are_not_finite_are_refused_and_told_so(value, bounds):
    known = {"p": Param(1.0, "", **bounds), "other": Param(2.0, "")}
    with pytest.raises(ValueError, match=f"^p of thing must be a finite number, not {value}$"):
        resolve_params("thing", known, {"p": value})


@pytest.mark.parametrize(("low", "high", "fine"), [(0.5, 1.0, True), (1.0, 1.0, False), (1.5, 1.0, False)])
def test_one_parameter_must_stay_below_another(low, high, fine):
    known = {"low": Param(0.0, "", below="high"), "high": Param(2.0, "")}
    if fine:
        assert resolve_params("thing", known, {"low": low, "high": high}) == {"low": low, "high": high}
    else:
        with pytest.raises(ValueError, match=r"^low of thing must be below high \(1\)$"):
            resolve_params("thing", known, {"high": high, "low": low})


def test_one_parameter_is_compared_with_the_default_of_another():
    known = {"low": Param(0.7, "", below="high"), "high": Param(1.3, "")}
    with pytest.raises(ValueError, match=r"low of thing must be below high \(1\.3\)"):
        resolve_params("thing", known, {"low": 1.4})
    with pytest.raises(ValueError, match=r"low of thing must be below high \(0\.6\)"):
        resolve_params("thing", known, {"high": 0.6})


def test_flags_are_in_no_need_of_bounds():
    for value in (True, False):
        assert resolve_params("x", {"flag": Param(False, "")}, {"flag": value}) == {"flag": value}


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("param", "value", "told"),
    [
        (Param(1.0, "", above=0.0), 0.0, "above 0, not 0"),
        (Param(1.0, "", above=0.0), -1.0, "above 0, not -1"),
        (Param(1.0, "", at_least=0.0), -1.0, "at least 0, not -1"),
        (Param(1.0, "", at_least=0.25), 0.125, "at least 0.25, not 0.125"),
        (Param(1.0, "", under=1.0), 1.0, "below 1, not 1"),
        (Param(1.0, "", at_most=1.0), 1.5, "at most 1, not 1.5"),
        (Param(1.0, "", above=0.0, at_most=100.0), 100.5, "at most 100, not 100.5"),
        (Param(1.0, ""), float("inf"), "a finite number, not inf"),
        (Param(None, "", choices=("u", "v")), "w", "one of u, v, not w"),
        (Param("u", "", choices=("u", "v")), "U", "one of u, v, not U"),
        (Param(None, "", choices=("u", "v")), 1.0, "one of u, v, not 1.0"),
    ],
)
def test_a_value_out_of_bounds_is_told_with_its_bound(param, value, told):
    with pytest.raises(ValueError, match=f"^{re.escape(f'p of thing must be {told}')}$"):
        resolve_params("thing", {"p": param}, {"p": value})


def test_choices_are_taken_as_they_are():
    for value in ("u", "v"):
        assert resolve_params("x", {"p": Param(None, "", choices=("u", "v"))}, {"p": value}) == {"p": value}


def test_strangers_are_all_named_beside_what_there_is():
    known = {"a": Param(1.0, ""), "b": Param(None, "")}
    with pytest.raises(ValueError, match=r"^thing has no parameter c, d \(it has: a, b\)$"):
        resolve_params("thing", known, {"c": 1.0, "a": 1.0, "d": 2.0})
    with pytest.raises(ValueError, match=r"^thing has no parameter c \(it has: none\)$"):
        resolve_params("thing", {}, {"c": 1.0})


def test_a_stranger_is_told_before_a_bound():
    with pytest.raises(ValueError, match="no parameter b"):
        resolve_params("thing", {"a": Param(1.0, "", above=0.0)}, {"a": -1.0, "b": 1.0})


def test_defaults_keep_to_their_bounds_too():
    with pytest.raises(ValueError, match="p of thing must be above 0, not -1"):
        resolve_params("thing", {"p": Param(-1.0, "", above=0.0)}, {})


# ---------------------------------------------------------------- descriptions


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, ""),
        ({"a": 0.5, "b": "word", "c": True, "d": False}, "a 0.5, b word, c"),
        ({"d": False}, ""),
        ({"c": False, "a": 2.0, "b": True}, "a 2, b"),
        ({"b": 1.0, "a": -0.5}, "b 1, a -0.5"),
        ({"n": 3, "tiny": 1e-7, "zero": 0.0}, "n 3, tiny 1e-07, zero 0"),
        ({"min_scale": 0.7, "max_scale": 1.3}, "min_scale 0.7, max_scale 1.3"),
    ],
)
def test_descriptions_name_what_is_set_in_its_order(values, told):
    assert describe_params(values) == told


# ---------------------------------------------------------------- the registries


@pytest.mark.parametrize("entry", REGISTRIES)
def test_every_entry_is_sound(entry):
    """Help for each parameter, defaults within the bounds, and other parameters that exist where one is named."""
    params = REGISTRIES[entry]
    values = resolve_params(entry, params, {})
    for name, param in params.items():
        assert param.help
        assert (name in values) == (param.default is not None)
        assert param.below is None or params[param.below].default is not None
        assert not param.choices or param.default in (None, *param.choices)


@pytest.mark.parametrize("entry", REGISTRIES)
def test_every_number_of_every_entry_refuses_nan_and_names_it(entry):
    for name, param in REGISTRIES[entry].items():
        if isinstance(param.default, bool):
            continue
        with pytest.raises(ValueError, match=rf"of {entry} must be") as fault:
            resolve_params(entry, REGISTRIES[entry], {name: float("nan")})
        assert re.search(rf"\b{name}\b", str(fault.value))
