"""From token scores r_t to token weights w_t: steps, every transform, the presets, normalisation and the EOS.

Pure maths on one response at a time; it knows no file, no sign convention of a file and no model. It never
imports torch itself (it works on the tensors it is given), so that the settings can read names, parameters and
defaults from here: a new transform is one function and one entry in `TRANSFORMS`, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tisdpo_cli.params import Param, Value, described, with_defaults
from tisdpo_cli.steps import STEPS, Context, apply_steps

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["chosen", "rejected"]
EosWeight = Literal["zero", "one", "score"]


@dataclass(frozen=True)
class Stream:
    """Where a random transform draws from: the same numbers on every machine and rank."""

    seed: int = 0
    row: int = 0
    side: Side = "chosen"

    def derived_seed(self) -> int:
        """A 63-bit seed that depends on all three parts."""
        digest = hashlib.sha256(f"{self.seed}/{self.row}/{self.side}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


Function = Callable[["Tensor", Side, Mapping[str, Any], Stream], "Tensor"]


@dataclass(frozen=True)
class Transform:
    """One way from scores to weights.

    Attributes:
        function: takes the scores r [n] of a response, clamped where the transform clamps, its side, the parameters
            and a random stream.
        params: its parameters by name.
        clamp: the names of the parameters that clamp, where some do, and what they clamp.
        positive: whether all its weights are above zero under given parameters, so that a mean of 1 can be
            asked for.
        reads_scores: whether its weights depend on the scores under given parameters, so that steps have a meaning.
    """

    function: Function
    help: str
    params: Mapping[str, Param] = field(default_factory=dict)
    clamp: tuple[str, str, Literal["r", "signed"]] | None = None
    positive: Callable[[Mapping[str, Any]], bool] = lambda _params: False
    reads_scores: Callable[[Mapping[str, Any]], bool] = lambda _params: True


def signed(scores: Tensor, side: Side) -> Tensor:
    """s = r for a chosen response and −r for a rejected one: large means that the token carries the preference."""
    return scores if side == "chosen" else -scores


def _exp(r: Tensor, side: Side, p: Mapping[str, Any], _: Stream) -> Tensor:
    return p["k"] * (p["mu"] * signed(r, side)).exp()


def _rank_based(r: Tensor, side: Side, p: Mapping[str, Any], _: Stream) -> Tensor:
    if r.numel() == 1:
        return r.new_ones(1)
    _values, group, sizes = signed(r, side).unique(sorted=True, return_inverse=True, return_counts=True)
    mean_rank = sizes.cumsum(0) - (sizes + 1) / 2
    fraction = mean_rank[group].to(r.dtype) / (r.numel() - 1)
    return p["min_scale"] + (p["max_scale"] - p["min_scale"]) * fraction


def _threshold_and_scale(r: Tensor, side: Side, p: Mapping[str, Any], _: Stream) -> Tensor:
    fraction = (signed(r, side) - p["min_val"]) / (p["max_val"] - p["min_val"])
    return p["min_scale"] + (p["max_scale"] - p["min_scale"]) * fraction


def _binary(r: Tensor, side: Side, p: Mapping[str, Any], _: Stream) -> Tensor:
    s = signed(r, side)
    # Rounded before the floor: 18.4 % of 375 tokens is 69, and 68.99… in floating point.
    kept = max(1, int(round(s.numel() * p["top_percent"] / 100, 9)))
    return (s >= s.topk(kept).values[-1]).to(r.dtype)


def _random(r: Tensor, _side: Side, p: Mapping[str, Any], stream: Stream) -> Tensor:
    import random

    draw = random.Random(stream.derived_seed()).random
    fractions = r.new_tensor([draw() for _ in range(r.numel())])
    return p["min_val"] + (p["max_val"] - p["min_val"]) * fractions


def _signed_score(r: Tensor, side: Side, _p: Mapping[str, Any], _s: Stream) -> Tensor:
    return signed(r, side)


def _scales(low: float, high: float) -> dict[str, Param]:
    return {
        "min_scale": Param(low, "weight of the lowest token", below="max_scale"),
        "max_scale": Param(high, "weight of the highest token"),
    }


def _values(low: float, high: float) -> dict[str, Param]:
    return {
        "min_val": Param(low, "lower end of the range", below="max_val"),
        "max_val": Param(high, "upper end of the range"),
    }


TRANSFORMS: dict[str, Transform] = {
    "exp": Transform(
        _exp,
        "k·exp(±μ·clamp(r, L, U)), the paper's",
        {
            "k": Param(1.0, "factor of exp", above=0.0),
            "mu": Param(1.0, "slope μ of exp"),
            "L": Param(-0.5, "lower clamp of r in exp", below="U"),
            "U": Param(1.5, "upper clamp of r in exp"),
        },
        clamp=("L", "U", "r"),
        positive=lambda p: True,
        reads_scores=lambda p: p["mu"] != 0,
    ),
    "rank_based": Transform(
        _rank_based, "ranks scaled to a range", _scales(0.7, 1.3), positive=lambda p: p["min_scale"] > 0
    ),
    "threshold_and_scale": Transform(
        _threshold_and_scale,
        "clamped, then scaled to a range",
        _values(-1.5, 1.5) | _scales(0.7, 1.3),
        clamp=("min_val", "max_val", "signed"),
        positive=lambda p: p["min_scale"] > 0,
    ),
    "threshold": Transform(
        _signed_score,
        "clamped scores",
        {
            "lower_threshold": Param(-1.0, "lower clamp of the signed score", below="upper_threshold"),
            "upper_threshold": Param(1.0, "upper clamp of the signed score"),
        },
        clamp=("lower_threshold", "upper_threshold", "signed"),
        positive=lambda p: p["lower_threshold"] > 0,
    ),
    "binary": Transform(
        _binary,
        "1 for the top tokens, 0 for the rest",
        {"top_percent": Param(100.0, "share of tokens that get weight 1", above=0.0, at_most=100.0)},
        reads_scores=lambda p: p["top_percent"] < 100,
    ),
    "random": Transform(
        _random,
        "uniform noise, a control",
        _values(0.7, 1.3),
        positive=lambda p: p["min_val"] > 0,
        reads_scores=lambda p: False,
    ),
    "origin": Transform(_signed_score, "the signed score itself"),
}

_NARROW = {"min_scale": 0.6, "max_scale": 1.4}
_WIDE = {"min_scale": 0.5, "max_scale": 1.5}

# A preset is a transform and the parameters it gives to every transform that it says something about.
PRESETS: dict[str, tuple[str, dict[str, dict[str, float]]]] = {
    "default": ("binary", {"binary": {"top_percent": 100.0}}),
    "aggressive": (
        "threshold_and_scale",
        {
            "threshold_and_scale": {"min_val": -2.0, "max_val": 2.0, **_WIDE},
            "binary": {"top_percent": 50.0},
            "threshold": {"lower_threshold": -0.8, "upper_threshold": 0.8},
            "random": {"min_val": 0.5, "max_val": 1.5},
            "rank_based": _WIDE,
        },
    ),
    "named_params": (
        "threshold_and_scale",
        {
            "threshold_and_scale": {"min_val": -1.8, "max_val": 1.8, **_NARROW},
            "binary": {"top_percent": 75.0},
            "threshold": {"lower_threshold": -0.9, "upper_threshold": 0.9},
            "random": {"min_val": 0.6, "max_val": 1.4},
            "rank_based": _NARROW,
        },
    ),
}


@dataclass(frozen=True)
class Recipe:
    """Steps, a transform with all its parameters, and what happens after it. Make it with `recipe`."""

    transform: str
    params: Mapping[str, Any]
    normalize: Literal["none", "mean"] = "none"
    eos_weight: EosWeight = "score"
    steps: Mapping[str, Value] = field(default_factory=dict)

    @property
    def entry(self) -> Transform:
        """The transform."""
        return FINAL if self.final else TRANSFORMS[self.transform]

    @property
    def final(self) -> bool:
        """Whether what is read are weights already."""
        return self.transform == FINAL_NAME

    def idle_steps(self) -> str | None:
        """Why its steps change no weight, or None where they do, or where there are none."""
        if not self.steps or self.entry.reads_scores(self.params):
            return None
        return f"{', '.join(self.steps)} would change nothing: {self.name()} does not read the scores"

    def name(self) -> str:
        """The transform alone: `rank_based (min_scale 0.7, max_scale 1.3)`."""
        params = described(self.params)
        return f"{self.transform} ({params})" if params else self.transform

    def describe(self) -> str:
        """`center dataset → rank_based (min_scale 0.7, max_scale 1.3), EOS score`."""
        steps = [described({name: self.steps[name]}) for name in STEPS if name in self.steps]
        normalised = ", mean 1" if self.normalize == "mean" else ""
        return f"{' → '.join([*steps, self.name()])}{normalised}, EOS {self.eos_weight}"


# Weights that come from elsewhere are taken as they are.
FINAL_NAME = "ready weights"
FINAL = Transform(lambda weights, _side, _params, _stream: weights, "as they are")


def final_recipe(eos_weight: EosWeight) -> Recipe:
    """For a file that holds weights: nothing is made of them, only the EOS may be set."""
    return Recipe(FINAL_NAME, {}, eos_weight=eos_weight)


def recipe(
    transform: str | None,
    preset: str | None = None,
    given: Mapping[str, Value] | None = None,
    normalize: Literal["none", "mean"] = "none",
    eos_weight: EosWeight = "score",
    steps: Mapping[str, Value] | None = None,
) -> Recipe:
    """Resolve names and parameters: those given, over the preset's, over the transform's defaults.

    Raises:
        ValueError: an unknown name, a parameter that the transform does not have, a value out of range, or a
            normalisation that the transform does not allow.
    """
    preset_transform, preset_params = _preset(preset)
    name = transform or preset_transform or "exp"
    if name not in TRANSFORMS:
        raise ValueError(f"unknown transform {name!r}; choose from {', '.join(TRANSFORMS)}")
    entry = TRANSFORMS[name]
    params = with_defaults(f"transform {name}", entry.params, {**preset_params.get(name, {}), **(given or {})})
    if normalize == "mean" and not entry.positive(params):
        raise ValueError(f"normalize mean needs weights above zero, which transform {name} does not promise here")
    wanted = with_defaults("the steps", {key: step.param for key, step in STEPS.items()}, steps or {})
    return Recipe(name, params, normalize, eos_weight, wanted)


def _preset(preset: str | None) -> tuple[str | None, dict[str, dict[str, float]]]:
    if preset is None:
        return None, {}
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[preset]


def transform_scores(scores: Tensor, side: Side, how: Recipe, stream: Stream, clip: bool = True) -> Tensor:
    """Weights [n] of n tokens of one response from their scores r [n] (float32) after the steps, in their order.

    With `clip` off, what they would be if the transform did not clamp.
    """
    if scores.numel() == 0:
        return scores.clone()
    if clip and how.entry.clamp is not None:
        scores = scores.clamp(*_ends(side, how))
    return how.entry.function(scores, side, how.params, stream)


def clipped(scores: Tensor, side: Side, how: Recipe) -> Tensor:
    """Which scores [n], after the steps, lie outside the range that the transform clamps to; none without a clamp."""
    if how.entry.clamp is None:
        return scores.isnan()
    low, high = _ends(side, how)
    return (scores < low) | (scores > high)


def _ends(side: Side, how: Recipe) -> tuple[float, float]:
    """The range of r that the transform clamps to; for a rejected response mirrored, where it clamps signed scores."""
    assert how.entry.clamp is not None
    low, high, what = how.entry.clamp
    first, last = how.params[low], how.params[high]
    return (-last, -first) if what == "signed" and side == "rejected" else (first, last)


def response_weights(
    scores: Tensor,
    eos_score: Tensor | None,
    kept: int,
    has_eos: bool,
    how: Recipe,
    stream: Stream,
    context: Context = Context(),  # noqa: B008 (it is frozen)
) -> Tensor:
    """Weights of one response as it is trained: [kept] tokens, and the EOS where the response has one.

    The order is: steps and transform on all scored tokens of the uncut response without the EOS, cut, normalise, set
    the EOS. With `score` the EOS is weighed as one more token of the uncut response; it leaves the others as they are.

    Args:
        scores: [n] float32 scores r of the uncut response without its EOS, n ≥ kept.
        eos_score: [1] score of the EOS; needed where has_eos and the EOS is weighed by its score.
        kept: tokens of the response that are trained, the EOS not counted.
        has_eos: whether the response still ends with its EOS.
        how: steps, transform, normalisation, and the treatment of the EOS.
        stream: names the response, for its side and for random transforms.
        context: what the steps need beside the scores.
    """

    def weighed(r: Tensor) -> Tensor:
        return transform_scores(apply_steps(r, how.steps, context), stream.side, how, stream)

    weights = weighed(scores)[:kept]
    divisor = weights.mean() if how.normalize == "mean" and kept else scores.new_ones(())
    weights = weights / divisor if how.normalize == "mean" else weights
    if not has_eos:
        return weights
    if how.eos_weight == "score":
        if eos_score is None:
            raise ValueError("the weight of the EOS needs its score")
        joined = scores.new_zeros(scores.numel() + 1)
        joined[:-1], joined[-1:] = scores, eos_score
        eos = weighed(joined)[-1:] / divisor
    else:
        eos = scores.new_full((1,), 1.0 if how.eos_weight == "one" else 0.0)
    extended = scores.new_zeros(kept + 1)
    extended[:-1], extended[-1:] = weights, eos
    return extended
