"""The groups of settings that are made from the registries of the method: objectives, steps and transforms.

A new entry in a registry has its options, checks and help at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import create_model, model_validator

from tisdpo_cli.method.objectives import OBJECTIVES, Loss, resolve_loss
from tisdpo_cli.method.params import Param
from tisdpo_cli.method.recipe import PRESETS, EosWeight, Recipe, final_recipe, resolve_recipe
from tisdpo_cli.method.steps import STEPS
from tisdpo_cli.method.transforms import TRANSFORMS
from tisdpo_cli.settings.fields import FiniteFloat, Group, PositiveFloat, setting

Uses = list[tuple[str, Param]]


def _uses(registry: Mapping[str, Mapping[str, Param]]) -> dict[str, Uses]:
    """Every parameter in a registry by name, with the entries that have it."""
    names = dict.fromkeys(name for params in registry.values() for name in params)
    return {name: [(entry, params[name]) for entry, params in registry.items() if name in params] for name in names}


def _parameter_fields(registry: Mapping[str, Mapping[str, Param]], panel: str) -> dict[str, Any]:
    """Fields for `create_model` from all parameters in a registry. Unset is None, or False for a flag."""
    return {name: _parameter_field(uses, panel) for name, uses in _uses(registry).items()}


def _parameter_field(uses: Uses, panel: str) -> tuple[Any, Any]:
    param = uses[0][1]
    if isinstance(param.default, bool):
        return bool, setting(False, f"{param.help} ({', '.join(entry for entry, _ in uses)})", panel)
    if param.choices:
        return Literal[param.choices] | None, setting(None, param.help, panel)
    return FiniteFloat | None, setting(None, f"{param.help}{_defaults(uses)}", panel)


def _defaults(uses: Uses) -> str:
    """` (exp; default: 1)`, or the default of each entry where they differ; empty where there is none."""
    entries: dict[float, list[str]] = {}
    for entry, param in uses:
        if param.default is not None:
            entries.setdefault(float(param.default), []).append(entry)
    if len(entries) == 1:
        ((default, users),) = entries.items()
        return f" ({', '.join(users)}; default: {default:g})"
    defaults = ", ".join(f"{default:g} in {' and '.join(users)}" for default, users in entries.items())
    return f" (default: {defaults})" if defaults else ""


def _given(group: Group, names: Iterable[str]) -> dict[str, Any]:
    """The given parameters of a group."""
    values = {name: getattr(group, name) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    left_out = set(names)
    return {name: value for name, value in values.items() if name not in left_out}


_OBJECTIVE_PARAMS = {name: entry.params for name, entry in OBJECTIVES.items()}
_TRANSFORM_PARAMS = {name: entry.params for name, entry in TRANSFORMS.items()}
_STEP_PARAMS = {"steps": {name: step.param for name, step in STEPS.items()}}


class MethodChoice(Group):
    """The objective; its parameters are added from the registry of objectives."""

    loss: Literal[tuple(OBJECTIVES)] = setting(  # type: ignore[valid-type]
        "dpo", "objective; dpo with token weights is TIS-DPO", "Method"
    )
    beta: PositiveFloat = setting(
        0.1, "KL penalty coefficient β: higher keeps the policy closer to the reference", "Method"
    )

    def objective(self) -> Loss:
        """The objective with its parameters."""
        return resolve_loss(self.loss, self.beta, _given(self, _uses(_OBJECTIVE_PARAMS)))

    def in_force(self) -> dict[str, Any]:
        """The objective and its parameters, without those of other objectives."""
        how = self.objective()
        return {**_without(super().in_force(), _uses(_OBJECTIVE_PARAMS)), **how.params}

    @model_validator(mode="after")
    def _makes_an_objective(self) -> MethodChoice:
        self.objective()
        return self


if TYPE_CHECKING:
    Method = MethodChoice
else:
    Method = create_model(
        "Method",
        __base__=MethodChoice,
        __doc__="The preference loss, with its parameters.",
        **_parameter_fields(_OBJECTIVE_PARAMS, "Method"),
    )


class WeightChoice(Group):
    """From scores to weights; steps and parameters are added from their registries."""

    weights_are: Literal["scores", "final"] = setting(
        "scores", "content of the weight columns: scores to transform, or final weights", "Token weights"
    )
    transform: Literal[tuple(TRANSFORMS)] | None = setting(  # type: ignore[valid-type]
        None, f"transform from scores to weights: {', '.join(TRANSFORMS)} (default: exp)", "Token weights"
    )
    preset: Literal[tuple(PRESETS)] | None = setting(  # type: ignore[valid-type]
        None, f"transform and parameters under one name: {', '.join(PRESETS)}", "Token weights"
    )
    normalize: Literal["none", "mean"] = setting(
        "none", "divide weights by their mean over the response", "Token weights"
    )
    eos_weight: Literal["auto", "zero", "one", "score"] = setting(
        "auto",
        "weight of the end-of-sequence token (auto: from its score if the dataset has one, else zero)",
        "Token weights",
    )

    def params(self) -> dict[str, float]:
        """The given transform parameters."""
        return _given(self, _uses(_TRANSFORM_PARAMS))

    def steps(self) -> dict[str, Any]:
        """The given steps."""
        return _given(self, STEPS)

    def recipe(self, eos_scores: bool) -> Recipe:
        """The recipe for a file that does or does not hold EOS scores."""
        eos: EosWeight = ("score" if eos_scores else "zero") if self.eos_weight == "auto" else self.eos_weight
        if self.weights_are == "final":
            return final_recipe(eos)
        return resolve_recipe(self.transform, self.preset, self.params(), self.normalize, eos, self.steps())

    def in_force(self) -> dict[str, Any]:
        """The transform with all its parameters, from preset and defaults too."""
        how = self.recipe(eos_scores=True)
        plain = _without(super().in_force(), ["preset", *_uses(_TRANSFORM_PARAMS)])
        return {**plain, "transform": how.transform, **how.params}

    def other_recipe(self, spec: str, eos_scores: bool) -> Recipe:
        """Another transform or preset, with the same steps and EOS weight.

        Args:
            spec: `name` or `name:param=value,…`.
            eos_scores: as in `recipe`.

        Raises:
            ValueError: there is no such transform, or its parameters do not fit.
        """
        name, _, params = spec.partition(":")
        given = {}
        for part in filter(None, params.split(",")):
            key, _, value = part.partition("=")
            try:
                given[key] = float(value)
            except ValueError:
                raise ValueError(f"{spec}: write {part!r} as param=number") from None
        transform, preset = (None, name) if name in PRESETS else (name, None)
        eos = self.recipe(eos_scores).eos_weight
        return resolve_recipe(transform, preset, given, eos_weight=eos, steps=self.steps())

    @model_validator(mode="after")
    def _makes_a_recipe(self) -> WeightChoice:
        made = {**self.params(), **self.steps(), **_given(self, ("transform", "preset"))}
        idle = [*made, *(["normalize"] if self.normalize != "none" else [])]
        if self.weights_are == "final" and idle:
            raise ValueError(f"final weights are not transformed; leave out {', '.join(idle)}")
        idle_steps = self.recipe(eos_scores=True).idle_steps()
        # A preset and the steps may come from different places; training warns.
        if idle_steps and (self.preset is None or self.transform is not None):
            raise ValueError(f"{idle_steps}; leave out the steps, or choose another transform")
        return self


def is_recipe(spec: str) -> bool:
    """Whether a text names a transform or preset rather than a file."""
    return spec.partition(":")[0] in {*TRANSFORMS, *PRESETS}


if TYPE_CHECKING:
    Weights = WeightChoice
else:
    Weights = create_model(
        "Weights",
        __base__=WeightChoice,
        __doc__="From scores to weights: steps, a transform with its parameters, the EOS.",
        **_parameter_fields(_STEP_PARAMS, "Steps before the transform"),
        **_parameter_fields(_TRANSFORM_PARAMS, "Token weights"),
    )
