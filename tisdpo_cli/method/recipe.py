"""A recipe: how the scores of one response become its token weights.

Steps, a transform with its parameters or a preset, normalisation, and the weight of the EOS. Pure maths on one response
at a time; like `transforms` it never imports torch itself, so that the settings can read the presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tisdpo_cli.method.params import Value, describe_params, resolve_params
from tisdpo_cli.method.steps import STEPS, Context, apply_steps
from tisdpo_cli.method.transforms import TRANSFORMS, RandomStream, Side, Transform

if TYPE_CHECKING:
    from torch import Tensor

EosWeight = Literal["zero", "one", "score"]

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
        params = describe_params(self.params)
        return f"{self.transform} ({params})" if params else self.transform

    def describe(self) -> str:
        """`center dataset → rank_based (min_scale 0.7, max_scale 1.3), EOS score`."""
        steps = [describe_params({name: self.steps[name]}) for name in STEPS if name in self.steps]
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
    params = resolve_params(f"transform {name}", entry.params, {**preset_params.get(name, {}), **(given or {})})
    if normalize == "mean" and not entry.positive(params):
        raise ValueError(f"normalize mean needs weights above zero, which transform {name} does not promise here")
    wanted = resolve_params("the steps", {key: step.param for key, step in STEPS.items()}, steps or {})
    return Recipe(name, params, normalize, eos_weight, wanted)


def _preset(preset: str | None) -> tuple[str | None, dict[str, dict[str, float]]]:
    if preset is None:
        return None, {}
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[preset]


def transform_scores(scores: Tensor, side: Side, how: Recipe, stream: RandomStream, clip: bool = True) -> Tensor:
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
    stream: RandomStream,
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
