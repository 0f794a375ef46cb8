"""A recipe: everything that turns the scores of one response into its token weights.

Steps, a transform with its parameters, normalization and the EOS weight. Pure maths on one response at a time. Like
`transforms` it never imports torch, so that the settings can read the presets without loading it.
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

# A preset: its transform, and its parameters for each transform.
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
    """Steps, a transform with all its parameters, normalization and EOS weight, as resolved by `resolve_recipe`."""

    transform: str
    params: Mapping[str, Any]
    normalize: Literal["none", "mean"] = "none"
    eos_weight: EosWeight = "score"
    steps: Mapping[str, Value] = field(default_factory=dict)

    @property
    def entry(self) -> Transform:
        """The transform's entry in the registry."""
        return FINAL if self.final else TRANSFORMS[self.transform]

    @property
    def final(self) -> bool:
        """Whether the input already consists of final weights."""
        return self.transform == FINAL_NAME

    def idle_steps(self) -> str | None:
        """Return why the steps have no effect, or None if they have one or there are none."""
        if not self.steps or self.entry.reads_scores(self.params):
            return None
        return f"{', '.join(self.steps)} would change nothing: {self.name()} does not read the scores"

    def name(self) -> str:
        """Describe the transform only: `rank_based (min_scale 0.7, max_scale 1.3)`."""
        params = describe_params(self.params)
        return f"{self.transform} ({params})" if params else self.transform

    def formula(self) -> str | None:
        """The weight of a token, for people; see `Transform.formula`. None where there is none."""
        weight = self.entry.formula(self.params)
        if not weight:
            return None
        return f"({weight}) / mean of the response" if self.normalize == "mean" else weight

    def describe(self) -> str:
        """Describe all of it: `center dataset → rank_based (min_scale 0.7, max_scale 1.3), EOS score`."""
        steps = [describe_params({name: self.steps[name]}) for name in STEPS if name in self.steps]
        normalization = ", mean 1" if self.normalize == "mean" else ""
        return f"{' → '.join([*steps, self.name()])}{normalization}, EOS {self.eos_weight}"


# Final weights from elsewhere are used unchanged.
FINAL_NAME = "ready weights"
FINAL = Transform(lambda weights, _side, _params, _stream: weights, "unchanged")


def final_recipe(eos_weight: EosWeight) -> Recipe:
    """The recipe for a file of final weights, which sets the EOS weight and nothing else."""
    return Recipe(FINAL_NAME, {}, eos_weight=eos_weight)


def resolve_recipe(
    transform: str | None,
    preset: str | None = None,
    params: Mapping[str, Value] | None = None,
    normalize: Literal["none", "mean"] = "none",
    eos_weight: EosWeight = "score",
    steps: Mapping[str, Value] | None = None,
) -> Recipe:
    """Look up a transform or preset and complete its parameters.

    Args:
        transform: a key of `TRANSFORMS`; the preset's, or `exp`, where None.
        preset: a key of `PRESETS`.
        params: values that override those of the preset, which override the defaults of the transform.
        normalize: `mean` divides the weights by their mean.
        eos_weight: weight of the EOS.
        steps: values of the steps to apply, by their keys in `STEPS`.

    Raises:
        ValueError: an unknown name, a parameter that the transform does not have, a value out of bounds, or a
            normalization that the transform does not allow.
    """
    preset_transform, preset_params = _preset(preset)
    name = transform or preset_transform or "exp"
    if name not in TRANSFORMS:
        raise ValueError(f"unknown transform {name!r}; choose from {', '.join(TRANSFORMS)}")
    entry = TRANSFORMS[name]
    resolved = resolve_params(f"transform {name}", entry.params, {**preset_params.get(name, {}), **(params or {})})
    if normalize == "mean" and not entry.positive(resolved):
        raise ValueError(f"normalize mean needs positive weights, which transform {name} does not guarantee here")
    resolved_steps = resolve_params("the steps", {key: step.param for key, step in STEPS.items()}, steps or {})
    return Recipe(name, resolved, normalize, eos_weight, resolved_steps)


def _preset(preset: str | None) -> tuple[str | None, dict[str, dict[str, float]]]:
    if preset is None:
        return None, {}
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[preset]


def transform_scores(scores: Tensor, side: Side, recipe: Recipe, stream: RandomStream, clip: bool = True) -> Tensor:
    """Weights [n] of the tokens of one response from their scores r [n] (float32), after the steps.

    With `clip` off, the transform does not clamp the scores.
    """
    if scores.numel() == 0:
        return scores.clone()
    if clip and recipe.entry.clamp is not None:
        scores = scores.clamp(*_clamp_range(side, recipe))
    return recipe.entry.function(scores, side, recipe.params, stream)


def clipped(scores: Tensor, side: Side, recipe: Recipe) -> Tensor:
    """Mask [n] of the scores, after the steps, outside the transform's clamp range; all False if it has none."""
    if recipe.entry.clamp is None:
        return scores.isnan()
    low, high = _clamp_range(side, recipe)
    return (scores < low) | (scores > high)


def _clamp_range(side: Side, recipe: Recipe) -> tuple[float, float]:
    """The clamp range of r, mirrored for a rejected response if the transform clamps signed scores."""
    assert recipe.entry.clamp is not None
    low_name, high_name, clamped = recipe.entry.clamp
    low, high = recipe.params[low_name], recipe.params[high_name]
    return (-high, -low) if clamped == "signed" and side == "rejected" else (low, high)


def response_weights(
    scores: Tensor,
    eos_score: Tensor | None,
    kept: int,
    has_eos: bool,
    recipe: Recipe,
    stream: RandomStream,
    context: Context = Context(),  # noqa: B008 (it is frozen)
) -> Tensor:
    """Compute the weights of one response for training: [kept] tokens, plus the EOS if the response has one.

    The order is: steps and transform on all scored tokens of the untruncated response without the EOS; truncate;
    normalize; set the EOS. With `score` the EOS is one more token of the untruncated response, and does not change the
    weights of the others.

    Args:
        scores: [n] float32 scores r of the untruncated response without its EOS, n ≥ kept.
        eos_score: [1] score of the EOS; required if has_eos and the recipe's EOS weight is `score`.
        kept: number of tokens left after truncation, without the EOS.
        has_eos: whether the truncated response still ends with its EOS.
        recipe: steps, transform, normalization and EOS weight.
        stream: the response's side and random stream.
        context: what the steps need besides the scores.
    """

    def weigh(r: Tensor) -> Tensor:
        return transform_scores(apply_steps(r, recipe.steps, context), stream.side, recipe, stream)

    weights = weigh(scores)[:kept]
    divisor = weights.mean() if recipe.normalize == "mean" and kept else scores.new_ones(())
    weights = weights / divisor if recipe.normalize == "mean" else weights
    if not has_eos:
        return weights
    if recipe.eos_weight == "score":
        if eos_score is None:
            raise ValueError("EOS weight 'score' needs the score of the EOS")
        joined = scores.new_zeros(scores.numel() + 1)
        joined[:-1], joined[-1:] = scores, eos_score
        eos = weigh(joined)[-1:] / divisor
    else:
        eos = scores.new_full((1,), 1.0 if recipe.eos_weight == "one" else 0.0)
    extended = scores.new_zeros(kept + 1)
    extended[:-1], extended[-1:] = weights, eos
    return extended
