"""The groups of settings that commands share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import create_model, model_validator

from tisdpo_cli.settings.fields import (
    FiniteFloat,
    Group,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    setting,
)
from tisdpo_cli.weights import PRESETS, TRANSFORMS, Recipe, recipe

Dtype = Literal["auto", "float32", "bf16"]


class Reading(Group):
    """How rows are read."""

    prompt_column: str = setting("prompt", "column of the prompt", "Data")
    chosen_column: str = setting("chosen", "column of the preferred response", "Data")
    rejected_column: str = setting("rejected", "column of the other response", "Data")
    on_bad_row: Literal["error", "skip"] = setting("error", "what to do with rows that cannot be used", "Data")


class Data(Reading):
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


class Method(Group):
    """The preference loss."""

    beta: PositiveFloat = setting(0.1, "strength of the tie to the reference", "Method")


# Where neither the batch size nor what it is the product of is given.
DEFAULT_BATCH_SIZE = 32


class Optim(Group):
    """The optimiser and how long it runs."""

    optimizer: Literal["rmsprop", "adamw", "adam", "sgd"] = setting("rmsprop", "optimizer", "Optimisation", "--optim")
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

    optimizer: Literal["rmsprop", "adamw", "adam", "sgd"] = setting("adamw", "optimizer", "Optimisation", "--optim")
    learning_rate: PositiveFloat | None = setting(  # type: ignore[assignment]
        None, "learning rate after the warm-up (2e-5; 3e-3 with --init)", "Optimisation", "--lr"
    )
    batch_size: PositiveInt | None = setting(
        None, f"examples per update, over all processes ({DEFAULT_BATCH_SIZE})", "Optimisation"
    )


class Memory(Group):
    """What decides how much is held at once; changes nothing but rounding."""

    micro_batch_size: PositiveInt | None = setting(
        None, "pairs per forward pass and process (at most 8 of the batch)", "Memory", "--per-device-train-batch-size"
    )
    gradient_accumulation: PositiveInt | None = setting(
        None, "forward passes per update", "Memory", "--gradient-accumulation-steps"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, more time", "Memory")
    dtype: Dtype = setting("auto", "compute in bf16 or float32 (auto: bf16 on GPUs that have it)", "Memory")


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
    """Which transform makes weights of the scores; its parameters are added from the registry of transforms."""

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
        chosen = {name: getattr(self, name) for name in parameter_names()}
        return {name: value for name, value in chosen.items() if value is not None}

    def recipe(self, eos_scores: bool) -> Recipe:
        """The recipe for a file that does or does not hold EOS scores."""
        eos = self.eos_weight
        resolved = ("score" if eos_scores else "zero") if eos == "auto" else eos
        return recipe(self.transform, self.preset, self.params(), self.normalize, resolved)

    @model_validator(mode="after")
    def _makes_a_recipe(self) -> WeightChoice:
        self.recipe(eos_scores=True)
        return self


def parameter_names() -> list[str]:
    """Names of all parameters of all transforms, each once."""
    return list(dict.fromkeys(name for entry in TRANSFORMS.values() for name in entry.params))


def _parameter_field(name: str) -> tuple[Any, Any]:
    uses = [(transform, entry.params[name]) for transform, entry in TRANSFORMS.items() if name in entry.params]
    defaults = ", ".join(f"{transform} {param.default:g}" for transform, param in uses)
    return FiniteFloat | None, setting(None, f"{uses[0][1].help} ({defaults})", "Token weights")


Weights = create_model(
    "Weights",
    __base__=WeightChoice,
    __doc__="Which transform makes weights of the scores, with its parameters.",
    **{name: _parameter_field(name) for name in parameter_names()},  # type: ignore[call-overload]
)
