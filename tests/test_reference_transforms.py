"""What the authors' research code makes of a file's numbers, derived again from its definitions, against ours.

The file holds −r in both columns. There the chosen numbers are negated and the rejected ones taken as they are, so both
become signed scores, and one function of them gives the weights. Scores here are untied: with ties it does other things
(equal scores get unequal weights), and this program does not follow it there. Agreement is within 2e-6.
"""

import random

import pytest
import torch

from tisdpo_cli.weights import PRESETS, Stream, recipe, transform_scores

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


def untied(seed, count):
    """Numbers of a file, two decimals, each once."""
    return [n / 100 for n in random.Random(seed).sample(range(-400, 400), count)]


def ours(stored, side, how):
    """Weights of the numbers of a file by this program."""
    return transform_scores(-torch.tensor(stored), side, how, Stream(0, 0, side)).tolist()


def theirs(stored, side, method, parameters):
    """The same by the definitions above."""
    signed = [-x for x in stored] if side == "chosen" else stored
    return DEFINITIONS[method](signed, parameters)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", DEFINITIONS)
@pytest.mark.parametrize("preset", THEIR_PRESETS)
def test_every_method_under_every_preset_agrees(preset, method, side):
    how = recipe(method, preset)
    for seed, count in enumerate((1, 2, 3, 8, 25, 60)):
        if method == "binary" and count * THEIR_PRESETS[preset][method]["top_percent"] < 100:
            continue  # there no token is left, here one always is
        stored = untied(seed, count)
        expected = theirs(stored, side, method, THEIR_PRESETS[preset][method])
        assert ours(stored, side, how) == pytest.approx(expected, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("preset", THEIR_PRESETS)
def test_a_preset_alone_sets_its_method(preset):
    stored = untied(9, 20)
    method = THEIR_METHODS[preset]
    for side in SIDES:
        expected = theirs(stored, side, method, THEIR_PRESETS[preset][method])
        assert ours(stored, side, recipe(None, preset)) == pytest.approx(expected, rel=2e-6, abs=2e-6)
    assert set(PRESETS) == set(THEIR_PRESETS)


@pytest.mark.parametrize("preset", THEIR_PRESETS)
def test_random_weights_keep_to_the_range_of_the_preset(preset):
    low, high = {"default": (0.7, 1.3), "aggressive": (0.5, 1.5), "named_params": (0.6, 1.4)}[preset]
    drawn = ours(untied(1, 200), "chosen", recipe("random", preset))
    assert low <= min(drawn) < low + 0.05
    assert high - 0.05 < max(drawn) <= high
