"""The groups of settings that commands share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, create_model, model_validator

from tisdpo_cli.method.objectives import OBJECTIVES, Loss, loss
from tisdpo_cli.method.params import Param
from tisdpo_cli.method.recipe import PRESETS, EosWeight, Recipe, final_recipe, recipe
from tisdpo_cli.method.steps import STEPS
from tisdpo_cli.method.transforms import TRANSFORMS
from tisdpo_cli.settings.fields import (
    FiniteFloat,
    Group,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    setting,
)

Dtype = Literal["auto", "float32", "bf16"]
Layout = Literal["auto", "shared-prefix", "separate"]


def layout_setting() -> Any:
    """`--layout`, the same for every command that runs a model over pairs."""
    return setting(
        "auto", "rows of pairs packed with the prompt once, or apart (auto: packed where it gives the same)", "Memory"
    )


class ColumnOptions(Group):
    """How rows are read."""

    prompt_column: str = setting("prompt", "column of the prompt", "Data")
    chosen_column: str = setting("chosen", "column of the preferred response", "Data")
    rejected_column: str = setting("rejected", "column of the other response", "Data")
    on_bad_row: Literal["error", "skip"] = setting("error", "what to do with rows that cannot be used", "Data")


class Data(ColumnOptions):
    """How rows are read and cut."""

    max_length: PositiveInt = setting(512, "tokens of prompt and response together, at most", "Data")
    max_prompt_length: PositiveInt = setting(256, "tokens a prompt is cut to where max-length is exceeded", "Data")
    keep_prompt: Literal["end", "start"] = setting("end", "which part of a cut prompt stays", "Data")

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Data:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}), "
                "or no response token is left"
            )
        return self


class SftData(Data):
    """How rows are read and cut for train-sft, which also takes instruction rows."""

    instruction_template: str = setting(
        "\n\nHuman: {instruction}\n\nAssistant:",
        "prompt of an instruction row; {instruction} is replaced (its input follows on a new line)",
        "Data",
    )

    @model_validator(mode="after")
    def _has_its_place(self) -> SftData:
        if self.instruction_template.count("{instruction}") != 1:
            raise ValueError("instruction_template needs {instruction} exactly once")
        return self


# Options from registries ---------------------------------------------------------------------------------------

Uses = list[tuple[str, Param]]


def _uses(registry: Mapping[str, Mapping[str, Param]]) -> dict[str, Uses]:
    """Every parameter of the entries of a registry by name, each once, with the entries that have it."""
    names = dict.fromkeys(name for params in registry.values() for name in params)
    return {name: [(entry, params[name]) for entry, params in registry.items() if name in params] for name in names}


def _parameter_fields(registry: Mapping[str, Mapping[str, Param]], panel: str) -> dict[str, Any]:
    """Fields, as `create_model` takes them, for all parameters in a registry. Unset is None, or False for a flag."""
    return {name: _parameter_field(uses, panel) for name, uses in _uses(registry).items()}


def _parameter_field(uses: Uses, panel: str) -> tuple[Any, Any]:
    param = uses[0][1]
    if isinstance(param.default, bool):
        return bool, setting(False, f"{param.help} ({', '.join(entry for entry, _ in uses)})", panel)
    if param.choices:
        return Literal[param.choices] | None, setting(None, param.help, panel)
    defaults = ", ".join(f"{entry} {p.default:g}" for entry, p in uses if p.default is not None)
    return FiniteFloat | None, setting(None, f"{param.help} ({defaults})" if defaults else param.help, panel)


def _given(group: Group, names: Iterable[str]) -> dict[str, Any]:
    """The parameters of a group that were given."""
    values = {name: getattr(group, name) for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    left_out = set(names)
    return {name: value for name, value in values.items() if name not in left_out}


_OBJECTIVE_PARAMS = {name: entry.params for name, entry in OBJECTIVES.items()}
_TRANSFORM_PARAMS = {name: entry.params for name, entry in TRANSFORMS.items()}
_STEP_PARAMS = {"steps": {name: step.param for name, step in STEPS.items()}}


class MethodChoice(Group):
    """Which objective is trained; its parameters are added from the registry of objectives."""

    loss: Literal[tuple(OBJECTIVES)] = setting(  # type: ignore[valid-type]
        "dpo", "the objective; dpo with token weights is TIS-DPO", "Method"
    )
    beta: PositiveFloat = setting(0.1, "strength of the tie to the reference", "Method")

    def objective(self) -> Loss:
        """The objective with its parameters."""
        return loss(self.loss, self.beta, _given(self, _uses(_OBJECTIVE_PARAMS)))

    def in_force(self) -> dict[str, Any]:
        """The objective with all its parameters, and no other's."""
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


# Where neither the batch size nor what it is the product of is given.
DEFAULT_BATCH_SIZE = 32


# What transformers calls its kinds of AdamW, which are one here.
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")
Optimizer = Annotated[
    Literal["rmsprop", "adamw", "adam", "sgd"],
    BeforeValidator(lambda given: "adamw" if given in _ADAMW else given),
]


class Optim(Group):
    """The optimiser and how long it runs."""

    optimizer: Optimizer = setting("rmsprop", "optimizer", "Optimisation", "--optim")
    learning_rate: PositiveFloat = setting(5e-7, "learning rate after the warm-up", "Optimisation", "--lr")
    lr_scheduler: Literal["constant", "linear", "cosine"] = setting(
        "constant", "learning rate after the warm-up: kept, or decayed to zero", "Optimisation", "--lr-scheduler-type"
    )
    warmup_steps: NonNegativeInt = setting(150, "updates of linear warm-up", "Optimisation")
    weight_decay: NonNegativeFloat = setting(0.0, "weight decay", "Optimisation")
    max_grad_norm: PositiveFloat = setting(10.0, "gradient norm is clipped here", "Optimisation")
    epochs: PositiveFloat = setting(1.0, "passes over the data", "Optimisation", "--num-train-epochs")
    max_steps: PositiveInt | None = setting(
        None, "updates; wins over epochs, the data repeating as needed", "Optimisation"
    )
    batch_size: PositiveInt | None = setting(
        None, f"pairs per update, over all processes ({DEFAULT_BATCH_SIZE})", "Optimisation"
    )


class SftOptim(Optim):
    """The optimiser of train-sft. The learning rate depends on whether the model is new."""

    optimizer: Optimizer = setting("adamw", "optimizer", "Optimisation", "--optim")
    learning_rate: PositiveFloat | None = setting(  # type: ignore[assignment]
        None, "learning rate after the warm-up (2e-5; 3e-3 with --init)", "Optimisation", "--lr"
    )
    batch_size: PositiveInt | None = setting(
        None, f"examples per update, over all processes ({DEFAULT_BATCH_SIZE})", "Optimisation"
    )


class Memory(Group):
    """What decides how much is held at once; changes nothing but rounding."""

    tokens_per_microbatch: PositiveInt | None = setting(
        None, "tokens per forward pass and process (by the model's shape and the device's memory)", "Memory"
    )
    micro_batch_size: PositiveInt | None = setting(
        None, "pairs per forward pass and process, in the place of tokens", "Memory", "--per-device-train-batch-size"
    )
    gradient_accumulation: PositiveInt | None = setting(
        None, "forward passes per update", "Memory", "--gradient-accumulation-steps"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time", "Memory")
    dtype: Dtype = setting("auto", "compute in bf16 or float32 (auto: bf16 on GPUs that have it)", "Memory")
    layout: Layout = layout_setting()

    @model_validator(mode="after")
    def _one_measure(self) -> Memory:
        if self.tokens_per_microbatch is not None and (self.micro_batch_size or self.gradient_accumulation):
            raise ValueError(
                "tokens_per_microbatch, micro_batch_size and gradient_accumulation all say how a batch is cut: give "
                "the first, or the others"
            )
        return self


class Evaluation(Group):
    """Evaluation on the test split."""

    eval_every: PositiveInt | None = setting(
        None, "evaluate every N updates, beside before and after", "Evaluation", "--eval-steps"
    )
    eval_pairs: NonNegativeInt = setting(256, "test pairs used, the first ones; 0 for no evaluation", "Evaluation")
    eval_batch_size: PositiveInt = setting(
        8, "pairs per forward pass and process", "Evaluation", "--per-device-eval-batch-size"
    )


class Checkpoints(Group):
    """Saving and resuming."""

    save_every: PositiveInt | None = setting(
        500, "checkpoint every N updates, and when interrupted", "Runtime", "--save-steps", shapes_result=False
    )
    keep_checkpoints: PositiveInt = setting(
        2, "newest checkpoints kept while training", "Runtime", "--save-total-limit", shapes_result=False
    )
    resume: str = setting(
        "auto",
        "go on from a checkpoint: auto, never, or its path",
        "Runtime",
        shapes_result=False,
        metavar="auto|never|PATH",
    )


class WeightChoice(Group):
    """How weights are made of the scores; steps and parameters are added from their registries."""

    weights_are: Literal["scores", "final"] = setting(
        "scores", "what the weight columns hold: scores to make weights of, or final weights", "Token weights"
    )
    transform: Literal[tuple(TRANSFORMS)] | None = setting(  # type: ignore[valid-type]
        None, f"from scores to weights: {', '.join(TRANSFORMS)} (exp)", "Token weights"
    )
    preset: Literal[tuple(PRESETS)] | None = setting(  # type: ignore[valid-type]
        None, f"a transform with its parameters: {', '.join(PRESETS)}", "Token weights"
    )
    normalize: Literal["none", "mean"] = setting("none", "divide by the mean weight of the response", "Token weights")
    eos_weight: Literal["auto", "zero", "one", "score"] = setting(
        "auto", "weight of the end-of-sequence token (auto: its score where the file has it)", "Token weights"
    )

    def params(self) -> dict[str, float]:
        """The transform parameters that were given."""
        return _given(self, _uses(_TRANSFORM_PARAMS))

    def steps(self) -> dict[str, Any]:
        """The steps that were asked for."""
        return _given(self, STEPS)

    def recipe(self, eos_scores: bool) -> Recipe:
        """The recipe for a file that does or does not hold EOS scores."""
        eos: EosWeight = ("score" if eos_scores else "zero") if self.eos_weight == "auto" else self.eos_weight
        if self.weights_are == "final":
            return final_recipe(eos)
        return recipe(self.transform, self.preset, self.params(), self.normalize, eos, self.steps())

    def in_force(self) -> dict[str, Any]:
        """The transform with all its parameters, whatever preset or default they come from."""
        how = self.recipe(eos_scores=True)
        plain = _without(super().in_force(), ["preset", *_uses(_TRANSFORM_PARAMS)])
        return {**plain, "transform": how.transform, **how.params}

    def other_recipe(self, spec: str, eos_scores: bool) -> Recipe:
        """Another transform, or preset, with the same steps and the same treatment of the EOS.

        Args:
            spec: `name` or `name:param=value,…`.
            eos_scores: as in `recipe`.

        Raises:
            ValueError: it is none, or its parameters do not fit.
        """
        name, _, params = spec.partition(":")
        given = {}
        for part in filter(None, params.split(",")):
            key, _, value = part.partition("=")
            try:
                given[key] = float(value)
            except ValueError:
                raise ValueError(f"{spec}: {part!r} is not written param=number") from None
        transform, preset = (None, name) if name in PRESETS else (name, None)
        eos = self.recipe(eos_scores).eos_weight
        return recipe(transform, preset, given, eos_weight=eos, steps=self.steps())

    @model_validator(mode="after")
    def _makes_a_recipe(self) -> WeightChoice:
        made = {**self.params(), **self.steps(), **_given(self, ("transform", "preset"))}
        idle = [*made, *(["normalize"] if self.normalize != "none" else [])]
        if self.weights_are == "final" and idle:
            raise ValueError(f"final weights are taken as they are: leave out {', '.join(idle)}")
        idle_steps = self.recipe(eos_scores=True).idle_steps()
        # A preset may stand in one place and the steps in another; training says so.
        if idle_steps and (self.preset is None or self.transform is not None):
            raise ValueError(f"{idle_steps}; leave the steps out, or choose another transform")
        return self


def is_recipe(spec: str) -> bool:
    """Whether a text names a transform or preset, rather than a file."""
    return spec.partition(":")[0] in {*TRANSFORMS, *PRESETS}


class Checks(Group):
    """What the scores of a file are held against. A check that cannot be made passes."""

    min_spread: NonNegativeFloat = setting(0.01, "least spread of r, in nats", "Checks")
    min_separation: NonNegativeFloat = setting(0.55, "least share of pairs that Σr separates", "Checks")
    max_drift: NonNegativeFloat = setting(1.0, "most change of r from first to last third, in spreads of r", "Checks")
    max_offset: NonNegativeFloat = setting(0.5, "most offset of r on tokens of both sides, in spreads of r", "Checks")
    max_clipped: NonNegativeFloat = setting(0.5, "largest share of clipped scores", "Checks")
    max_unscored: NonNegativeFloat = setting(0.5, "largest share of tokens beyond the cut", "Checks")


if TYPE_CHECKING:
    Weights = WeightChoice
else:
    Weights = create_model(
        "Weights",
        __base__=WeightChoice,
        __doc__="How weights are made of the scores: steps, a transform with its parameters, the end of the sequence.",
        **_parameter_fields(_STEP_PARAMS, "Steps before the transform"),
        **_parameter_fields(_TRANSFORM_PARAMS, "Token weights"),
    )
