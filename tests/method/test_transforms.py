"""Transforms, presets, normalisation and the EOS weight, against the oracle and by hand.

Float32 weights agree with the float64 oracle within 2e-6, relative or absolute.
"""

import itertools
import math
import re

import oracle
import pytest
import torch

from tisdpo_cli.method.params import Param
from tisdpo_cli.method.recipe import PRESETS, clipped, final_recipe, resolve_recipe, response_weights
from tisdpo_cli.method.steps import Centers, Context
from tisdpo_cli.method.transforms import TRANSFORMS, RandomStream, Transform

SIDES = ("chosen", "rejected")
CLOSE = {"rel": 2e-6, "abs": 2e-6}

# Every transform that the oracle knows, with its defaults and with other parameters.
VARIANTS = [
    *((name, {}) for name in oracle.TRANSFORMS),
    ("exp", {"k": 2.0, "mu": 0.5, "L": -1.0, "U": 2.0}),
    ("exp", {"mu": -1.5}),
    ("rank_based", {"min_scale": 0.25, "max_scale": 3.0}),
    ("threshold_and_scale", {"min_val": -0.5, "max_val": 0.25, "min_scale": 0.5, "max_scale": 1.5}),
    ("threshold", {"lower_threshold": 0.1, "upper_threshold": 0.8}),
    ("binary", {"top_percent": 50.0}),
    ("binary", {"top_percent": 18.4}),
    ("binary", {"top_percent": 0.5}),
]


def random_scores(seed, count, tied=False):
    """Scores of about one nat, floats that float32 holds exactly; tied ones are multiples of a half."""
    scores = 1.3 * torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return ((2 * scores).round() / 2 if tied else scores).tolist()


def weigh(how, scores, side="chosen", *, eos=None, kept=None, has_eos=False, seed=0, row=0):
    """`response_weights` on lists."""
    eos = None if eos is None else torch.tensor([eos])
    kept = len(scores) if kept is None else kept
    return response_weights(torch.tensor(scores), eos, kept, has_eos, how, RandomStream(seed, row, side)).tolist()


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("name", "params"), VARIANTS)
def test_transforms_agree_with_the_oracle(name, params, side, tied):
    how = resolve_recipe(name, params=params)
    for seed, count in enumerate((1, 2, 3, 10, 101)):
        scores = random_scores(seed, count, tied)
        assert weigh(how, scores, side) == pytest.approx(oracle.transform(name, scores, side, **params), **CLOSE)


def test_worked_examples():
    """Four tokens; s is r for the chosen side and its negative for the rejected one.

    exp: r clamped to [-0.5, 1.5], on both sides r itself: e^-0.5, 1, e, e^1.5, and their reciprocals.
    rank_based: ranks 1 to 4 on the line from 0.7 to 1.3, a step of 0.2.
    threshold_and_scale: clamped to +-1.5 and moved to 0.7 .. 1.3, so 0 -> 1.0 and 1 -> 1.2.
    binary 50: floor(4 * 0.5) = 2 tokens.
    """
    r = [-2.0, 0.0, 1.0, 3.0]
    expected = {
        ("exp", "chosen"): [math.exp(-0.5), 1, math.e, math.exp(1.5)],
        ("exp", "rejected"): [math.exp(0.5), 1, 1 / math.e, math.exp(-1.5)],
        ("rank_based", "chosen"): [0.7, 0.9, 1.1, 1.3],
        ("rank_based", "rejected"): [1.3, 1.1, 0.9, 0.7],
        ("threshold_and_scale", "chosen"): [0.7, 1.0, 1.2, 1.3],
        ("threshold_and_scale", "rejected"): [1.3, 1.0, 0.8, 0.7],
        ("threshold", "chosen"): [-1, 0, 1, 1],
        ("threshold", "rejected"): [1, 0, -1, -1],
        ("origin", "chosen"): [-2, 0, 1, 3],
        ("origin", "rejected"): [2, 0, -1, -3],
    }
    for (name, side), weights in expected.items():
        assert weigh(resolve_recipe(name), r, side) == pytest.approx(weights, **CLOSE), (name, side)
    half = resolve_recipe("binary", params={"top_percent": 50.0})
    assert weigh(half, r, "chosen") == [0, 0, 1, 1]
    assert weigh(half, r, "rejected") == [1, 1, 0, 0]


def test_exp_is_the_default_transform():
    assert resolve_recipe(None) == resolve_recipe("exp")


def test_a_lone_token_gets_weight_one_by_rank():
    assert weigh(resolve_recipe("rank_based", params={"min_scale": 0.1, "max_scale": 0.5}), [7.0]) == [1.0]


def test_binary_counts_in_decimals():
    """29 % of 100 tokens are 29 and 18.4 % of 375 are 69, though floats give 28.99… and 68.99…."""
    for count, percent, kept in ((100, 29.0, 29), (375, 18.4, 69), (5, 1.0, 1), (3, 100.0, 3)):
        weights = weigh(resolve_recipe("binary", params={"top_percent": percent}), [float(t) for t in range(count)])
        assert weights == [0.0] * (count - kept) + [1.0] * kept


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "random"])
def test_equal_scores_get_equal_weights(name, side):
    given = {"top_percent": 40.0} if name == "binary" else {}
    scores = [0.5, -0.25, 0.5, 0.0, -0.0, 0.5, -0.25, 3.0, 3.0]
    weights = weigh(resolve_recipe(name, params=given), scores, side)
    for (r, w), (other, v) in itertools.combinations(zip(scores, weights, strict=True), 2):
        assert r != other or w == v


@pytest.mark.parametrize("name", ["exp", "rank_based", "threshold_and_scale"])
def test_a_token_that_carries_the_preference_weighs_more_than_one(name):
    """A large r does so in a chosen response, a very negative r in a rejected one."""
    scores = [2.0, 0.01, 0.0, -0.01, -2.0]
    chosen, rejected = (weigh(resolve_recipe(name), scores, side) for side in SIDES)
    assert chosen[0] > 1 > chosen[-1]
    assert rejected[-1] > 1 > rejected[0]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_empty_response_has_no_weights(name):
    assert weigh(resolve_recipe(name), []) == []


def test_scores_outside_the_clamp_are_counted():
    """exp clamps r to [-0.5, 1.5] on both sides; threshold clamps the signed score to [-1, 1]; ranks clamp nothing."""
    r = torch.tensor([-1.2, -0.6, 0.0, 1.5, 1.6])
    for side in SIDES:
        assert clipped(r, side, resolve_recipe("exp")).tolist() == [True, True, False, False, True]
        assert clipped(r, side, resolve_recipe("threshold")).tolist() == [True, False, False, True, True]
        assert not clipped(r, side, resolve_recipe("rank_based")).any()
    lopsided = resolve_recipe("threshold", params={"lower_threshold": -1.55, "upper_threshold": 0.0})
    assert clipped(r, "chosen", lopsided).tolist() == [False, False, False, True, True]
    assert clipped(r, "rejected", lopsided).tolist() == [True, True, False, False, True]


# ---------------------------------------------------------------- random


def test_random_is_the_same_every_time_and_differs_by_seed_row_and_side():
    how = resolve_recipe("random")
    scores = [0.0] * 8
    first = weigh(how, scores, "chosen", seed=1, row=12)
    torch.manual_seed(99)
    assert weigh(how, scores, "chosen", seed=1, row=12) == first
    others = [("rejected", 1, 12), ("chosen", 2, 12), ("chosen", 1, 13), ("chosen", 11, 2), ("chosen", 12, 1)]
    draws = [first, *(weigh(how, scores, side, seed=seed, row=row) for side, seed, row in others)]
    assert len({tuple(weights) for weights in draws}) == len(draws)
    assert len(set(first)) == len(first)


def test_random_is_pinned():
    """The same on every machine and in every version, so that a run can be made again."""
    weights = weigh(resolve_recipe("random"), [0.0] * 3, "rejected", seed=7, row=3)
    assert weights == pytest.approx([0.7563619, 1.2225614, 0.8397679], abs=1e-6)


def test_random_fills_its_range_evenly():
    how = resolve_recipe("random", params={"min_val": -0.5, "max_val": 2.0})
    weights = torch.tensor(weigh(how, [0.0] * 20_000))
    assert weights.min() >= -0.5
    assert weights.max() <= 2.0
    # Standard error of the mean: 2.5 / sqrt(12 * 20000) = 0.005.
    assert abs(weights.mean() - 0.75) < 0.025
    assert weights.quantile(0.25).item() == pytest.approx(0.125, abs=0.05)


# ---------------------------------------------------------------- cut, normalisation, EOS


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("normalize", ["none", "mean"])
@pytest.mark.parametrize("eos_weight", ["zero", "one", "score"])
@pytest.mark.parametrize("name", ["exp", "rank_based", "threshold_and_scale"])
def test_response_weights_agree_with_the_oracle(name, eos_weight, normalize, side):
    how = resolve_recipe(name, normalize=normalize, eos_weight=eos_weight)
    for seed, count in enumerate((1, 2, 7, 40)):
        scores = random_scores(seed, count, tied=bool(seed % 2))
        for kept, has_eos in ((count, True), (count, False), (count - 1, False), (0, False)):
            options = {"eos_score": 0.75, "kept": kept, "has_eos": has_eos}
            expected = oracle.response_weights(
                name, scores, side, **options, normalize=normalize, eos_weight=eos_weight
            )
            got = weigh(how, scores, side, eos=0.75, kept=kept, has_eos=has_eos)
            assert got == pytest.approx(expected, **CLOSE)


def test_the_cut_comes_after_the_transform_and_before_the_normalisation():
    """Ranks of [0, 1, 2, 3] give 0.7, 0.9, 1.1, 1.3; two are kept, of mean 0.8: 0.875 and 1.125.

    As one token more, an EOS of score 9 has the highest rank, 1.3, and 1.3 / 0.8 = 1.625. The others stay.
    """
    scores = [0.0, 1.0, 2.0, 3.0]
    assert weigh(resolve_recipe("rank_based"), scores, kept=2) == pytest.approx([0.7, 0.9], **CLOSE)
    normalised = resolve_recipe("rank_based", normalize="mean")
    assert weigh(normalised, scores, kept=2) == pytest.approx([0.875, 1.125], **CLOSE)
    with_eos = weigh(normalised, scores, kept=2, eos=9.0, has_eos=True)
    assert with_eos == pytest.approx([0.875, 1.125, 1.625], **CLOSE)


@pytest.mark.parametrize("name", ["exp", "rank_based", "threshold_and_scale", "random"])
def test_normalised_weights_have_mean_one(name):
    weights = weigh(resolve_recipe(name, normalize="mean"), random_scores(3, 30), "rejected", kept=17)
    assert sum(weights) / 17 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("eos_weight", "expected"), [("zero", 0.0), ("one", 1.0)])
def test_a_fixed_eos_weight_is_not_normalised(eos_weight, expected):
    how = resolve_recipe("exp", normalize="mean", eos_weight=eos_weight)
    assert weigh(how, [1.0, 1.5], has_eos=True)[-1] == expected


def test_a_cut_response_has_no_eos_weight():
    assert len(weigh(resolve_recipe("exp"), [1.0, 1.5], eos=0.1, kept=2, has_eos=False)) == 2


def test_an_empty_response_still_has_its_eos():
    """The EOS alone is weighed as a response of one token: e^0.5 by exp, 1 by rank."""
    for name, weight in (("exp", math.exp(0.5)), ("rank_based", 1.0)):
        assert weigh(resolve_recipe(name, normalize="mean"), [], eos=0.5, has_eos=True) == pytest.approx([weight])


def test_the_score_of_the_eos_must_be_there_to_be_used():
    with pytest.raises(ValueError, match="needs the score of the EOS"):
        weigh(resolve_recipe("exp", eos_weight="score"), [1.0], has_eos=True)
    assert weigh(resolve_recipe("exp", eos_weight="zero"), [0.0], has_eos=True) == [1.0, 0.0]


def test_weighing_changes_no_scores_and_wants_no_gradient():
    scores, eos = torch.tensor(random_scores(1, 6)), torch.tensor([0.5])
    before = scores.clone()
    for name in TRANSFORMS:
        weights = response_weights(scores, eos, 6, True, resolve_recipe(name), RandomStream())
        assert weights.dtype == torch.float32
        assert not weights.requires_grad
        weights.zero_()
    assert torch.equal(scores, before)
    assert eos.item() == 0.5


# ---------------------------------------------------------------- presets and parameters

WIDE, NARROW = {"min_scale": 0.5, "max_scale": 1.5}, {"min_scale": 0.6, "max_scale": 1.4}


@pytest.mark.parametrize(
    ("preset", "transform", "params"),
    [
        ("default", None, {"top_percent": 100}),
        ("aggressive", None, {"min_val": -2, "max_val": 2, **WIDE}),
        ("aggressive", "binary", {"top_percent": 50}),
        ("aggressive", "threshold", {"lower_threshold": -0.8, "upper_threshold": 0.8}),
        ("aggressive", "random", {"min_val": 0.5, "max_val": 1.5}),
        ("aggressive", "rank_based", WIDE),
        ("named_params", None, {"min_val": -1.8, "max_val": 1.8, **NARROW}),
        ("named_params", "binary", {"top_percent": 75}),
        ("named_params", "threshold", {"lower_threshold": -0.9, "upper_threshold": 0.9}),
        ("named_params", "random", {"min_val": 0.6, "max_val": 1.4}),
        ("named_params", "rank_based", NARROW),
    ],
)
def test_presets_have_the_numbers_of_the_design(preset, transform, params):
    chosen = {"default": "binary"}.get(preset, "threshold_and_scale")
    how = resolve_recipe(transform, preset)
    assert how.transform == (transform or chosen)
    assert how.params == params


def test_defaults_have_the_numbers_of_the_design():
    defaults = {name: {key: param.default for key, param in entry.params.items()} for name, entry in TRANSFORMS.items()}
    assert defaults == {
        "exp": {"k": 1, "mu": 1, "L": -0.5, "U": 1.5},
        "rank_based": {"min_scale": 0.7, "max_scale": 1.3},
        "threshold_and_scale": {"min_val": -1.5, "max_val": 1.5, "min_scale": 0.7, "max_scale": 1.3},
        "threshold": {"lower_threshold": -1, "upper_threshold": 1},
        "binary": {"top_percent": 100},
        "random": {"min_val": 0.7, "max_val": 1.3},
        "origin": {},
    }
    assert set(PRESETS) == {"default", "aggressive", "named_params"}


def test_the_default_preset_is_plain_dpo():
    assert weigh(resolve_recipe(None, "default"), random_scores(0, 9), "rejected") == [1.0] * 9


def test_what_is_given_wins_over_the_preset_and_the_preset_over_the_default():
    how = resolve_recipe(None, "aggressive", {"max_val": 3.0})
    assert how.params == {"min_val": -2, "max_val": 3, **WIDE}
    # A transform that the preset says nothing about has its own defaults.
    assert resolve_recipe("exp", "aggressive").params == resolve_recipe("exp").params


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"transform": "rank"}, ["'rank'", "rank_based"]),
        ({"transform": None, "preset": "bold"}, ["'bold'", "aggressive"]),
        ({"transform": "rank_based", "params": {"mu": 1.0}}, ["rank_based", "mu", "min_scale"]),
        ({"transform": "origin", "params": {"k": 1.0}}, ["origin", "k"]),
        ({"transform": "exp", "params": {"L": 2.0, "U": 1.0}}, ["L", "U"]),
        ({"transform": "exp", "params": {"U": -1.0}}, ["L", "U"]),
        ({"transform": "exp", "params": {"k": 0.0}}, ["k", "above 0"]),
        ({"transform": "rank_based", "params": {"min_scale": 1.4}}, ["min_scale", "max_scale"]),
        ({"transform": "threshold", "params": {"lower_threshold": 2.0}}, ["lower_threshold", "upper_threshold"]),
        ({"transform": "threshold_and_scale", "params": {"max_val": -2.0}}, ["min_val", "max_val"]),
        ({"transform": "random", "params": {"min_val": 1.4}}, ["min_val", "max_val"]),
        ({"transform": "binary", "params": {"top_percent": 0.0}}, ["top_percent", "above 0"]),
        ({"transform": "binary", "params": {"top_percent": -5.0}}, ["top_percent", "above 0"]),
        ({"transform": "binary", "params": {"top_percent": 100.5}}, ["top_percent", "at most 100"]),
    ],
)
def test_faults_name_what_is_wrong(arguments, named):
    with pytest.raises(ValueError, match=re.escape(named[0])) as fault:
        resolve_recipe(**arguments)
    for word in named:
        assert word in str(fault.value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("origin", {}),
        ("binary", {}),
        ("threshold", {}),
        ("rank_based", {"min_scale": 0.0}),
        ("rank_based", {"min_scale": -0.1}),
        ("threshold_and_scale", {"min_scale": 0.0}),
        ("random", {"min_val": -0.1}),
    ],
)
def test_normalisation_is_refused_where_weights_can_be_zero_or_negative(name, given):
    with pytest.raises(ValueError, match=f"normalize.*{name}"):
        resolve_recipe(name, params=given, normalize="mean")


@pytest.mark.parametrize(
    ("name", "given"), [("exp", {}), ("rank_based", {}), ("random", {}), ("threshold", {"lower_threshold": 0.1})]
)
def test_normalisation_is_allowed_where_all_weights_are_positive(name, given):
    assert resolve_recipe(name, params=given, normalize="mean").normalize == "mean"


def test_a_new_transform_is_one_entry(monkeypatch):
    def scaled(r, side, p, stream):
        return p["factor"] * (r if side == "chosen" else -r)

    entry = Transform(scaled, "a multiple of the signed score", {"factor": Param(2.0, "factor", above=0.0)})
    monkeypatch.setitem(TRANSFORMS, "scaled", entry)
    assert weigh(resolve_recipe("scaled"), [1.0, -3.0], "rejected", eos=0.5, has_eos=True) == [-2.0, 6.0, -1.0]
    assert weigh(resolve_recipe("scaled", "aggressive", {"factor": 4.0}), [1.0]) == [4.0]
    assert "scaled (factor 2)" in resolve_recipe("scaled").describe()
    with pytest.raises(ValueError, match="factor of transform scaled must be above 0"):
        resolve_recipe("scaled", params={"factor": -1.0})
    with pytest.raises(ValueError, match="normalize"):
        resolve_recipe("scaled", normalize="mean")
    with pytest.raises(ValueError, match=r"choose from .*scaled"):
        resolve_recipe("unknown")


# ---------------------------------------------------------------- weights from elsewhere


@pytest.mark.parametrize("side", SIDES)
def test_final_weights_are_taken_as_they_are(side):
    given = [0.5, -2.0, 0.0, 7.0]
    assert weigh(final_recipe("zero"), given, side, has_eos=True) == [*given, 0.0]
    assert weigh(final_recipe("one"), given, side, has_eos=True, kept=2) == [0.5, -2.0, 1.0]
    assert weigh(final_recipe("score"), given, side, eos=3.0, has_eos=True) == [*given, 3.0]
    assert not clipped(torch.tensor(given), side, final_recipe("one")).any()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("eos_weight", ["zero", "one", "score"])
def test_final_weights_keep_their_bits_sign_and_scale(eos_weight, side):
    """Nothing is clamped, turned round, scaled or normalised, however large or small; a cut response has no EOS."""
    given = torch.tensor([-0.0, 1e-42, -3e38, 1 / 3, *random_scores(5, 20)])
    how, stream, eos = final_recipe(eos_weight), RandomStream(3, 4, side), torch.tensor([-0.125])
    for kept in (24, 3, 0):
        weights = response_weights(given, eos, kept, False, how, stream)
        assert weights.view(torch.int32).tolist() == given[:kept].view(torch.int32).tolist()
    weights = response_weights(given, eos, 24, True, how, stream)
    assert weights[:-1].view(torch.int32).tolist() == given.view(torch.int32).tolist()
    assert weights[-1] == {"zero": 0.0, "one": 1.0, "score": -0.125}[eos_weight]


def test_final_weights_of_an_empty_response():
    assert weigh(final_recipe("one"), [], has_eos=True) == [1.0]
    assert weigh(final_recipe("score"), [], eos=-2.0, has_eos=True) == [-2.0]
    assert weigh(final_recipe("zero"), []) == []


def test_the_final_weight_of_an_eos_must_be_there_to_be_used():
    with pytest.raises(ValueError, match="needs the score of the EOS"):
        weigh(final_recipe("score"), [1.0], has_eos=True)


def test_final_weights_are_no_transform_that_can_be_asked_for():
    how = final_recipe("one")
    assert how.final
    assert not how.steps
    assert how.normalize == "none"
    assert how.describe() == "ready weights, EOS one"
    assert how.transform not in TRANSFORMS
    assert not any(resolve_recipe(name).final for name in TRANSFORMS)
    with pytest.raises(ValueError, match="unknown transform"):
        resolve_recipe(how.transform)


# ---------------------------------------------------------------- steps in a recipe


def test_a_recipe_tells_its_steps_in_their_order():
    """Whatever the order in which they were asked for."""
    steps = {"decay": 0.9, "spans": "clause", "center": "dataset", "dead_zone": 0.25}
    told = "center dataset → spans clause → dead_zone 0.25 → decay 0.9 → rank_based (min_scale 0.7, max_scale 1.3)"
    for order in itertools.permutations(steps):
        given = {name: steps[name] for name in order}
        how = resolve_recipe("rank_based", steps=given, normalize="mean", eos_weight="one")
        assert how == resolve_recipe("rank_based", steps=steps, normalize="mean", eos_weight="one")
        assert how.describe() == f"{told}, mean 1, EOS one"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"transform": None}, "exp (k 1, mu 1, L -0.5, U 1.5), EOS score"),
        ({"transform": "origin", "eos_weight": "zero"}, "origin, EOS zero"),
        ({"transform": None, "preset": "default"}, "binary (top_percent 100), EOS score"),
        ({"transform": "origin", "steps": {"spans": "word"}}, "spans word → origin, EOS score"),
        ({"transform": "origin", "steps": {"decay": 0.5, "center": "position"}},
         "center position → decay 0.5 → origin, EOS score"),
    ],
)  # fmt: skip
def test_a_recipe_tells_what_it_does_and_nothing_else(arguments, told):
    assert resolve_recipe(**arguments).describe() == told


def test_steps_come_before_the_transform_and_its_normalisation():
    """r = [3, -1, 0.5] less 0.5, dead zone 1: [2.5, -1.5, 0]. By rank 1.3, 0.7, 1.0; clamped to 1, -1, 0.

    For the rejected side the steps work on r all the same, and only then is it turned round.
    """
    context = Context(Centers(0.5, (), 0.0))
    scores, steps = torch.tensor([3.0, -1.0, 0.5]), {"center": "dataset", "dead_zone": 1.0}

    def after(side, transform, **more):
        how = resolve_recipe(transform, steps=steps, **more)
        return response_weights(scores, None, 3, False, how, RandomStream(0, 0, side), context).tolist()

    assert after("chosen", "rank_based") == pytest.approx([1.3, 0.7, 1.0], **CLOSE)
    assert after("rejected", "rank_based") == pytest.approx([0.7, 1.3, 1.0], **CLOSE)
    assert after("chosen", "threshold") == [1, -1, 0]
    assert after("rejected", "threshold") == [-1, 1, 0]
    assert after("rejected", "origin") == [-2.5, 1.5, 0]
    mean = (math.exp(1.5) + math.exp(-0.5) + 1) / 3
    expected = [math.exp(1.5) / mean, math.exp(-0.5) / mean, 1 / mean]
    assert after("chosen", "exp", normalize="mean") == pytest.approx(expected, **CLOSE)


def test_random_draws_the_same_numbers_whatever_the_steps():
    """It reads no scores, so that a control stays the control; the EOS is one draw more and changes no other."""
    stream, scores = RandomStream(7, 3, "rejected"), torch.tensor(random_scores(2, 3))
    context = Context(Centers(0.5, (), 0.1), [0, 0, 1])
    every = {"center": "dataset", "spans": "word", "dead_zone": 0.2, "decay": 0.5}
    pinned = [0.7563619, 1.2225614, 0.8397679]
    draws = weigh(resolve_recipe("random"), [0.0] * 4, "rejected", seed=7, row=3)
    for steps in ({}, {"decay": 0.5}, every):
        how = resolve_recipe("random", steps=steps)
        weights = response_weights(scores, torch.tensor([2.0]), 3, True, how, stream, context)
        assert weights[:3].tolist() == pytest.approx(pinned, abs=1e-6)
        assert weights.tolist() == draws
