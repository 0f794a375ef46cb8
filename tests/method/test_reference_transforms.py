"""What the authors' research code makes of a file's numbers, derived again from its definitions, against ours.

The file holds −r in both columns. There the chosen numbers are negated and the rejected ones taken as they are, so both
become signed scores, and one function of them gives the weights. Scores here are untied: with ties it does other things
(equal scores get unequal weights), and this program does not follow it there. Agreement is within 2e-6.
"""

import random

import pytest
import torch

from tisdpo_cli.method.recipe import PRESETS, resolve_recipe, transform_scores
from tisdpo_cli.method.transforms import RandomStream

SIDES = ("chosen", "rejected")


def ranked(signed, p):
    """Places from the lowest to the highest score, spread evenly over the range."""
    if len(signed) == 1:
        return [1.0]
    places = {score: place for place, score in enumerate(sorted(signed))}
    step = (p["max_scale"] - p["min_scale"]) / (len(signed) - 1)
    return [p["min_scale"] + step * places[score] for score in signed]


def clamped_and_scaled(signed, p):
    """A straight line between two corners, flat outside."""
    slope = (p["max_scale"] - p["min_scale"]) / (p["max_val"] - p["min_val"])
    return [p["min_scale"] + slope * (min(p["max_val"], max(p["min_val"], s)) - p["min_val"]) for s in signed]


def clamped(signed, p):
    return [min(p["upper_threshold"], max(p["lower_threshold"], s)) for s in signed]


def top(signed, p):
    """1 for the first so many of the scores in falling order."""
    share = int(len(signed) * p["top_percent"] / 100)
    best = sorted(signed, reverse=True)[:share]
    return [float(s in best) for s in signed]


DEFINITIONS = {
    "rank_based": ranked,
    "threshold_and_scale": clamped_and_scaled,
    "threshold": clamped,
    "binary": top,
    "origin": lambda signed, _p: signed,
}
# The numbers of its three presets, for every method that they say something about.
THEIR_PRESETS = {
    "default": {
        "rank_based": {"min_scale": 0.7, "max_scale": 1.3},
        "threshold_and_scale": {"min_val": -1.5, "max_val": 1.5, "min_scale": 0.7, "max_scale": 1.3},
        "threshold": {"lower_threshold": -1.0, "upper_threshold": 1.0},
        "binary": {"top_percent": 100},
        "origin": {},
    },
    "aggressive": {
        "rank_based": {"min_scale": 0.5, "max_scale": 1.5},
        "threshold_and_scale": {"min_val": -2.0, "max_val": 2.0, "min_scale": 0.5, "max_scale": 1.5},
        "threshold": {"lower_threshold": -0.8, "upper_threshold": 0.8},
        "binary": {"top_percent": 50},
        "origin": {},
    },
    "named_params": {
        "rank_based": {"min_scale": 0.6, "max_scale": 1.4},
        "threshold_and_scale": {"min_val": -1.8, "max_val": 1.8, "min_scale": 0.6, "max_scale": 1.4},
        "threshold": {"lower_threshold": -0.9, "upper_threshold": 0.9},
        "binary": {"top_percent": 75},
        "origin": {},
    },
}
THEIR_METHODS = {"default": "binary", "aggressive": "threshold_and_scale", "named_params": "threshold_and_scale"}


PRESETS_AND_NONE = {None: THEIR_PRESETS["default"], **THEIR_PRESETS}


def untied(seed, count, decimals=None):
    """Numbers of a file, no two of them the same float32: about one nat, or with two decimals as theirs."""
    draw = random.Random(f"{seed} {count}")
    if decimals == 2:
        return [n / 100 for n in draw.sample(range(-400, 400), count)]
    stored = [draw.gauss(0, 1.3) for _ in range(count)]
    assert torch.tensor(stored).unique().numel() == count
    return stored


def ours(stored, side, how, row=0):
    """Weights of the numbers of a file by this program."""
    return transform_scores(-torch.tensor(stored), side, how, RandomStream(0, row, side)).tolist()


def theirs(stored, side, method, parameters):
    """The same by the definitions above."""
    signed = [-x for x in stored] if side == "chosen" else stored
    return DEFINITIONS[method](signed, parameters)


def agreed(stored, side, method, parameters):
    """What both should give: theirs, but where their `binary` keeps no token, this program keeps the best one."""
    weights = theirs(stored, side, method, parameters)
    if method == "binary" and not any(weights):
        best = min(stored) if side == "chosen" else max(stored)
        return [float(x == best) for x in stored]
    return weights


@pytest.mark.parametrize("decimals", [None, 2])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", DEFINITIONS)
@pytest.mark.parametrize("preset", PRESETS_AND_NONE)
def test_every_method_under_every_preset_agrees(preset, method, side, decimals):
    how, parameters = resolve_recipe(method, preset), PRESETS_AND_NONE[preset][method]
    for count in range(1, 61):
        stored = untied(count, count, decimals)
        expected = agreed(stored, side, method, parameters)
        assert ours(stored, side, how) == pytest.approx(expected, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("preset", THEIR_PRESETS)
def test_a_preset_alone_sets_its_method(preset):
    method = THEIR_METHODS[preset]
    for count in (1, 20, 60):
        stored = untied(9, count)
        for side in SIDES:
            expected = agreed(stored, side, method, THEIR_PRESETS[preset][method])
            assert ours(stored, side, resolve_recipe(None, preset)) == pytest.approx(expected, rel=2e-6, abs=2e-6)
    assert set(PRESETS) == set(THEIR_PRESETS)


@pytest.mark.parametrize("preset", THEIR_PRESETS)
def test_presets_hold_the_same_numbers_for_every_method(preset):
    for method, parameters in THEIR_PRESETS[preset].items():
        assert resolve_recipe(method, preset).params == parameters
    assert resolve_recipe(None, preset).transform == THEIR_METHODS[preset]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("count", [4, 33, 60, 200])
def test_whole_percentages_keep_as_many_tokens(count, side):
    stored = untied(2, count)
    for percent in range(1, 101):
        expected = agreed(stored, side, "binary", {"top_percent": percent})
        assert ours(stored, side, resolve_recipe("binary", params={"top_percent": float(percent)})) == expected


def test_a_top_that_holds_no_token_holds_one_here():
    """Half of one token is none there, and the response would weigh nothing at all."""
    assert theirs([0.3], "chosen", "binary", {"top_percent": 50}) == [0.0]
    assert ours([0.3], "chosen", resolve_recipe("binary", "aggressive")) == [1.0]
    assert ours([0.3, 0.1, -0.2], "chosen", resolve_recipe("binary", params={"top_percent": 20.0})) == [0.0, 0.0, 1.0]
    assert ours([0.3, 0.1, -0.2], "rejected", resolve_recipe("binary", params={"top_percent": 20.0})) == [1.0, 0.0, 0.0]


def test_the_sides_by_hand():
    """−r = [-2, 0.5] in both columns: r is 2 and −0.5. Chosen, s = r; rejected, s = −r, the file's own numbers."""
    stored = [-2.0, 0.5]
    assert ours(stored, "chosen", resolve_recipe("origin")) == [2.0, -0.5]
    assert ours(stored, "rejected", resolve_recipe("origin")) == [-2.0, 0.5]
    assert ours(stored, "chosen", resolve_recipe("threshold")) == [1.0, -0.5]
    assert ours(stored, "rejected", resolve_recipe("threshold")) == [-1.0, 0.5]
    assert ours(stored, "chosen", resolve_recipe("rank_based")) == pytest.approx([1.3, 0.7], rel=2e-6)
    assert ours(stored, "rejected", resolve_recipe("rank_based")) == pytest.approx([0.7, 1.3], rel=2e-6)
    assert ours(stored, "chosen", resolve_recipe("threshold_and_scale")) == pytest.approx([1.3, 0.9], rel=2e-6)
    assert ours(stored, "rejected", resolve_recipe("threshold_and_scale")) == pytest.approx([0.7, 1.1], rel=2e-6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("preset", PRESETS_AND_NONE)
def test_random_weights_keep_to_the_range_of_the_preset_and_can_be_drawn_again(preset, side):
    """The numbers themselves are drawn anew in every run there."""
    low, high = {"aggressive": (0.5, 1.5), "named_params": (0.6, 1.4)}.get(preset, (0.7, 1.3))
    how, stored = resolve_recipe("random", preset), untied(1, 200)
    draws = ours(stored, side, how)
    assert low <= min(draws) < low + 0.05
    assert high - 0.05 < max(draws) <= high
    random.seed(5)
    torch.manual_seed(5)
    assert ours([-x for x in stored], side, how) == draws
    assert ours(stored, side, how, row=1) != draws
