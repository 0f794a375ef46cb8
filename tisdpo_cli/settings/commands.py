"""One settings model per command; the registry `COMMANDS` is what the CLI is built from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tisdpo_cli.settings.fields import (
    Group,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seed,
    group_of,
    setting,
    shapes_result,
)
from tisdpo_cli.settings.groups import (
    Checkpoints,
    Checks,
    Data,
    Dtype,
    Evaluation,
    Layout,
    Memory,
    Method,
    Optim,
    Reading,
    SftData,
    SftOptim,
    Weights,
    is_recipe,
    layout_setting,
)
from tisdpo_cli.templates import TEMPLATES, template_text

_MODEL = "Model"
# The two sides of the contrast that scores are made of.
CONTRAST = ("forward", "reverse")
_RUNTIME = "Runtime"


class Command(BaseSettings):
    """Settings of a command. Values come from layers (see `sources`), the first layer that has one wins."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, validate_default=True, coerce_numbers_to_str=True, hide_input_in_errors=True
    )

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: Any, **_others: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take `value_layers=[{...}, ...]` as the sources, highest priority first; plain keywords go before them."""
        layers = init_settings.init_kwargs.pop("value_layers", ())
        return (init_settings, *(_Layer(settings_cls, layer) for layer in layers))

    def leaves(self) -> Iterator[tuple[str, FieldInfo, Any]]:
        """(dotted name, field, value) of every single setting."""
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Group):
                for inner, inner_info in type(value).model_fields.items():
                    yield f"{name}.{inner}", inner_info, getattr(value, inner)
            else:
                yield name, info, value

    def fingerprint(self) -> dict[str, Any]:
        """The settings that shape the result, by dotted name, as they are in force."""
        made: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Group):
                made.update({f"{name}.{inner}": set_to for inner, set_to in value.in_force().items()})
            elif shapes_result(info):
                made[name] = value
        return made

    def with_values(self, values: Mapping[str, Any]) -> Command:
        """A copy in which some settings, by dotted name, have other values; nothing is checked again."""
        updates: dict[str, Any] = {}
        for path, value in values.items():
            first, dot, name = path.partition(".")
            group = updates.get(first, getattr(self, first))
            updates[first] = group.model_copy(update={name: value}) if dot else value
        return self.model_copy(update=updates)


class _Layer(PydanticBaseSettingsSource):
    """One source of values, as a nested dict."""

    def __init__(self, settings_cls: type[BaseSettings], values: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def output_setting() -> Any:
    """`--output-dir`, the same for every command that makes something."""
    return setting(..., "directory to make", _RUNTIME, "-o", shapes_result=False)


def _path_input(help_text: str, panel: str, *flags: str, default: Any = ...) -> Any:
    # Paths are compared by the content they hold, not by their name.
    return setting(default, help_text, panel, *flags, shapes_result=False, metavar="PATH")


def _seed() -> Any:
    return setting(0, "seed of everything that is drawn", _RUNTIME)


def _overwrite() -> Any:
    return setting(False, "remove an output that was made with other settings", _RUNTIME, shapes_result=False)


def _remote_code() -> Any:
    return setting(False, "run code that comes with the model", _MODEL)


def _template_help(side: str, default: str) -> str:
    names = ", ".join(TEMPLATES)
    return f"prompt of the {side} side: {names}, or text with {{}} for the prompt ({default} with --model)"


def _dry_run() -> Any:
    return setting(
        False, "check everything, show the plan and the first row, train nothing", _RUNTIME, shapes_result=False
    )


def _profile() -> Any:
    """`--profile`, the same for every training."""
    return setting(
        None,
        "write a trace of some updates, and a table of where their time goes",
        _RUNTIME,
        shapes_result=False,
        metavar="DIR",
    )


class TrainPairs(Command):
    """What train-dpo, train-reverse and train have in common."""

    model: PathText = _path_input("model to train: directory or hub id", _MODEL, "-m", "--model-name-or-path")
    ref_model: PathText | None = _path_input("reference (the model itself as it starts)", _MODEL, default=None)
    trust_remote_code: bool = _remote_code()
    dataset: PathText = _path_input("preference pairs: JSONL file, directory or hub id", "Data", "-d")
    output_dir: PathText = output_setting()
    seed: Seed = _seed()
    data: Data = Data()
    method: Method = Method()
    optim: Optim = Optim()
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    cache_dir: PathText | None = setting(
        None,
        "where the reference's log-probs are kept for the next training (~/.cache/tisdpo)",
        _RUNTIME,
        shapes_result=False,
        metavar="PATH",
    )
    no_ref_cache: bool = setting(
        False, "neither read nor keep the reference's log-probs", _RUNTIME, shapes_result=False
    )
    profile: PathText | None = _profile()
    overwrite: bool = _overwrite()
    dry_run: bool = _dry_run()


class TrainDpo(TrainPairs):
    """Train the forward contrastive model π⁺: DPO on the pairs as they are."""


class TrainReverse(TrainPairs):
    """Train the reverse contrastive model π⁻: DPO with chosen and rejected swapped."""


class Train(TrainPairs):
    """Train with the token-weighted DPO loss on a scored dataset: TIS-DPO itself."""

    dataset: PathText = _path_input("scored dataset, from `tisdpo estimate`", "Data", "-d")
    weights: Weights = Weights()

    @model_validator(mode="after")
    def _loss_takes_weights(self) -> Train:
        if not self.method.objective().objective.takes_weights:
            raise ValueError(f"loss {self.method.loss} takes no token weights; train it with train-dpo")
        return self


class TrainSft(Command):
    """Train a starting model by supervised fine-tuning, or make one from the data with --init."""

    model: PathText | None = _path_input("model to train: directory or hub id (or --init)", _MODEL, "-m", default=None)
    init: bool = setting(False, "make a small tokenizer and model from the dataset itself", _MODEL)
    vocab_size: PositiveInt = setting(2048, "tokens of the new tokenizer, with --init", _MODEL)
    hidden_size: PositiveInt = setting(192, "width of the new model, with --init", _MODEL)
    layers: PositiveInt = setting(4, "depth of the new model, with --init", _MODEL)
    heads: PositiveInt = setting(6, "attention heads of the new model, with --init", _MODEL)
    trust_remote_code: bool = _remote_code()
    dataset: PathText = _path_input("pairs, or instruction rows: JSONL file or directory", "Data", "-d")
    target: Literal["chosen", "rejected", "both"] = setting("chosen", "which responses of pairs to learn", "Data")
    train_on_prompt: bool = setting(False, "learn the prompt tokens too", "Data")
    output_dir: PathText = output_setting()
    seed: Seed = _seed()
    data: SftData = SftData()
    optim: SftOptim = SftOptim()
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    profile: PathText | None = _profile()
    overwrite: bool = _overwrite()
    dry_run: bool = _dry_run()

    @classmethod
    def new_model_shape(cls) -> dict[str, int]:
        """The settings that shape a new model, with their defaults."""
        return {name: cls.model_fields[name].default for name in ("vocab_size", "hidden_size", "layers", "heads")}

    @model_validator(mode="after")
    def _one_start(self) -> TrainSft:
        if self.init == (self.model is not None):
            raise ValueError("give either --model PATH or --init")
        if not self.init:
            idle = [name for name, default in self.new_model_shape().items() if getattr(self, name) != default]
            if idle:
                raise ValueError(f"{', '.join(idle)} shape a new model and need --init")
        elif self.vocab_size < 258:
            raise ValueError("vocab_size must be at least 258: 256 bytes, end-of-sequence and padding")
        elif self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of 2 · heads ({self.heads})")
        return self

    def learning_rate(self) -> float:
        """The learning rate in force: 2e-5, or 3e-3 for a new model, unless one is given."""
        given = self.optim.learning_rate
        return given if given is not None else (3e-3 if self.init else 2e-5)


class Estimate(Command):
    """Score every response token under both contrastive models and write the dataset back with the scores.

    The two are --forward and --reverse, or one --model under two prompt templates.
    """

    forward: PathText | None = _path_input("positive model π⁺, from `tisdpo train-dpo`", _MODEL, default=None)
    reverse: PathText | None = _path_input("negative model π⁻, from `tisdpo train-reverse`", _MODEL, default=None)
    model: PathText | None = _path_input(
        "one model for both, told apart by the templates", _MODEL, "-m", "--model-name-or-path", default=None
    )
    positive_template: str | None = setting(None, _template_help("forward", "harmless"), _MODEL, metavar="NAME|TEXT")
    negative_template: str | None = setting(None, _template_help("reverse", "harmful"), _MODEL, metavar="NAME|TEXT")
    trust_remote_code: bool = _remote_code()
    dataset: PathText = _path_input("preference pairs to score: JSONL file, directory or hub id", "Data", "-d")
    output_dir: PathText = output_setting()
    data: Data = Data()
    batch_size: PositiveInt = setting(
        16, "pairs per forward pass and process", "Memory", "--per-device-eval-batch-size"
    )
    keep_logps: bool = setting(False, "write the log-probs under both models too, in columns of their own", "Data")
    sequential: bool = setting(False, "hold one model in memory at a time", "Memory", shapes_result=False)
    dtype: Dtype = setting("auto", "compute in bf16 or float32 (auto: float32 on CPUs)", "Memory")
    layout: Layout = layout_setting()
    resume: Literal["auto", "never"] = setting(
        "auto", "go on where an interrupted run stopped", _RUNTIME, shapes_result=False
    )
    overwrite: bool = _overwrite()

    def templates(self) -> dict[str, str]:
        """The text of the template of each side; the prompt as it is where two models make the contrast."""
        defaults = ("normal", "normal") if self.model is None else ("harmless", "harmful")
        chosen = (self.positive_template or defaults[0], self.negative_template or defaults[1])
        return dict(zip(CONTRAST, map(template_text, chosen), strict=True))

    def fingerprint(self) -> dict[str, Any]:
        """The settings that shape the result, the templates by their text."""
        texts = self.templates()
        return {
            **super().fingerprint(),
            "positive_template": texts["forward"],
            "negative_template": texts["reverse"],
        }

    def models(self) -> dict[str, str]:
        """The option and the path of each side's model."""
        if self.model is not None:
            return dict.fromkeys(CONTRAST, self.model)
        assert self.forward is not None
        assert self.reverse is not None
        return {"forward": self.forward, "reverse": self.reverse}

    @field_validator("positive_template", "negative_template")
    @classmethod
    def _is_a_template(cls, value: str | None) -> str | None:
        if value is not None:
            template_text(value)
        return value

    @model_validator(mode="after")
    def _two_sides(self) -> Estimate:
        pair = (self.forward is not None) + (self.reverse is not None)
        if self.model is None and pair < 2:
            missing = [f"--{side}" for side in CONTRAST if getattr(self, side) is None]
            verb = "are" if len(missing) > 1 else "is"
            raise ValueError(f"{' and '.join(missing)} {verb} needed, or one --model for both sides")
        if self.model is not None and pair:
            raise ValueError("give --forward and --reverse, or one --model for both sides, not all")
        return self


class InspectWeights(Command):
    """Show what the weights say: a summary of the file, and a pair token by token."""

    scored: PathText = _path_input("scored dataset, from `tisdpo estimate`", "Data", "--dataset", "-d")
    tokenizer: PathText | None = _path_input("tokenizer, where none lies beside the data", _MODEL, default=None)
    split: str = setting("train", "split to show", "Data")
    data: Reading = Reading()
    index: NonNegativeInt | None = setting(None, "pair to show (0 is the first)", "View", "-i")
    sort: Literal["spread", "max-weight", "min-mean", "random", "index"] = setting(
        "spread", "order of pairs: spread of r, highest weight, lowest mean weight", "View"
    )
    limit: PositiveInt | None = setting(None, "pairs to show (1; 1000 in --html; all in --table)", "View", "-n")
    show: Literal["weights", "scores", "adjusted"] = setting(
        "weights", "colour tokens by weight, by score r, or by r after the steps", "View"
    )
    top: PositiveInt = setting(8, "tokens in the lists of highest and lowest", "View")
    compare: str | None = setting(
        None,
        "compare with another transform, as name:param=value,…, or with another scored dataset",
        "View",
        metavar="TRANSFORM|PATH",
    )
    previews: str = setting(
        "exp rank_based threshold_and_scale binary:top_percent=50",
        "transforms to switch to in --html, each as name:param=value,…",
        "View",
        metavar="NAMES",
    )
    html: PathText | None = setting(
        None, "write a report that stands alone: one offline page", "View", shapes_result=False, metavar="FILE"
    )
    table: PathText | None = setting(
        None,
        "write a CSV file with one line for each token, and beside it FILE.json: where it comes from",
        "View",
        shapes_result=False,
        metavar="FILE",
    )
    svg: PathText | None = setting(None, "write the view as a picture", "View", shapes_result=False, metavar="FILE")
    check: bool = setting(False, "exit with 1 where a check of the whole file fails", "Checks", shapes_result=False)
    checks: Checks = Checks()
    min_count: PositiveInt = setting(5, "occurrences a token needs to be in these lists", "View")
    seed: Seed = _seed()
    weights: Weights = Weights()

    @model_validator(mode="after")
    def _shows_what_there_is(self) -> InspectWeights:
        final = self.weights.weights_are == "final"
        if final and self.show != "weights":
            raise ValueError("a file of final weights holds no scores to show")
        named = self.compare is not None and is_recipe(self.compare)
        if final and named:
            raise ValueError("a file of final weights holds no scores that another transform could weigh")
        for spec in [*self.previews.split(), *([self.compare] if named and self.compare else [])]:
            self.weights.other_recipe(spec, eos_scores=True)
        return self


class Evaluate(Command):
    """Hold a model against its reference and another model: preferences, KL, samples, and rewards where given."""

    model: PathText = _path_input(
        "model to evaluate: directory or hub id; several checkpoints with commas between them",
        _MODEL, "-m", "--model-name-or-path",
    )  # fmt: skip
    baseline: PathText | None = _path_input("model to compare with", _MODEL, default=None)
    ref_model: PathText = _path_input("reference: the model that training started from", _MODEL)
    trust_remote_code: bool = _remote_code()
    dataset: PathText = _path_input("preference pairs: JSONL file, directory or hub id", "Data", "-d")
    split: str | None = setting(None, "split to evaluate on (test, where there is one)", "Data")
    data: Data = Data()
    beta: PositiveFloat = setting(0.1, "of the implicit rewards β log π/π_ref", "Evaluation")
    eval_pairs: PositiveInt = setting(256, "pairs used, the first ones", "Evaluation")
    sample_prompts: NonNegativeInt = setting(64, "distinct prompts to answer, the first ones; 0 for none", "Samples")
    samples_per_prompt: PositiveInt = setting(1, "responses to each prompt", "Samples")
    max_new_tokens: PositiveInt = setting(128, "tokens of a response, at most", "Samples")
    temperature: NonNegativeFloat = setting(1.0, "of the softmax; 0 takes the most probable token", "Samples")
    samples: PathText | None = setting(
        None, "write all responses side by side, as JSON Lines", "Samples", shapes_result=False, metavar="FILE"
    )
    reward_model: PathText | None = _path_input(
        "sequence classification model whose one output is the reward", "Rewards", default=None
    )
    scorer: str | None = setting(
        None, "function that gets prompts and responses and gives rewards", "Rewards", metavar="MODULE:FUNCTION"
    )
    batch_size: PositiveInt = setting(16, "rows per forward pass", "Memory", "--per-device-eval-batch-size")
    dtype: Dtype = setting("auto", "compute in bf16 or float32 (auto: float32 on CPUs)", "Memory")
    seed: Seed = _seed()

    def models(self) -> list[str]:
        """The models to evaluate, as they are named."""
        return [name.strip() for name in self.model.split(",")]

    @model_validator(mode="after")
    def _can_be_asked(self) -> Evaluate:
        if not all(self.models()):
            raise ValueError("model: a name is empty; write A,B,C")
        if self.reward_model is not None and self.scorer is not None:
            raise ValueError("give rewards by reward_model or by scorer, not both")
        needs = [name for name in ("reward_model", "scorer", "samples") if getattr(self, name) is not None]
        if needs and not self.sample_prompts:
            raise ValueError(f"{needs[0]} needs responses: sample_prompts must not be 0")
        return self

    @field_validator("scorer")
    @classmethod
    def _names_a_function(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.]+:\w+", value):
            raise ValueError("write module:function")
        return value


class Stages(Command):
    """The settings of `run` that are no stage's own."""

    model: PathText | None = _path_input("starting model (without a train_sft section)", _MODEL, "-m", default=None)
    dataset: PathText = _path_input("preference pairs: JSONL file, directory or hub id", "Data", "-d")
    output_dir: PathText = output_setting()
    method: Literal["dpo", "sft", "prompt"] = setting(
        "dpo",
        "contrastive models: forward and reverse DPO, SFT on chosen and on rejected, or one model with two prompts",
        "Stages",
        shapes_result=False,
    )
    overwrite: bool = setting(
        False, "make stages again whose settings or inputs have changed", _RUNTIME, shapes_result=False
    )


class Run(Stages):
    """The whole pipeline from one file: finished stages are skipped, an interrupted one goes on."""

    max_steps: PositiveInt | None = setting(None, "updates of every training", "Stages")
    seed: Seed = setting(0, "seed of every stage", "Stages")
    dtype: Dtype = setting("auto", "precision of every stage", "Stages")
    train_sft: TrainSft | None = None
    train_dpo: TrainDpo | None = None
    train_reverse: TrainReverse | None = None
    sft_chosen: TrainSft | None = None
    sft_rejected: TrainSft | None = None
    estimate: Estimate
    train: Train
    inspect_weights: InspectWeights

    @model_validator(mode="after")
    def _makes_scores(self) -> Run:
        if self.train.weights.weights_are == "final":
            raise ValueError("final weights need no contrastive models: train with them by `tisdpo train` alone")
        return self

    def stages(self) -> dict[str, Command]:
        """The stages that make something, in order."""
        every = {name: getattr(self, name) for name in STAGES if name != "inspect_weights"}
        return {name: settings for name, settings in every.items() if settings is not None}


COMMANDS: dict[str, type[Command]] = {
    "train-dpo": TrainDpo,
    "train-reverse": TrainReverse,
    "estimate": Estimate,
    "train": Train,
    "inspect-weights": InspectWeights,
    "run": Run,
    "train-sft": TrainSft,
    "evaluate": Evaluate,
}

# The stages of `run`, in order, each with the settings of its command.
STAGES: dict[str, type[Command]] = {
    "train_sft": TrainSft,
    "train_dpo": TrainDpo,
    "train_reverse": TrainReverse,
    "sft_chosen": TrainSft,
    "sft_rejected": TrainSft,
    "estimate": Estimate,
    "train": Train,
    "inspect_weights": InspectWeights,
}


def leaf_paths(command: type[Command]) -> dict[str, FieldInfo]:
    """Every single setting of a command by dotted name (`optim.batch_size`)."""
    paths: dict[str, FieldInfo] = {}
    for name, info in command.model_fields.items():
        group = group_of(info)
        if group is None:
            if name not in STAGES:
                paths[name] = info
        else:
            paths.update({f"{name}.{inner}": field for inner, field in group.model_fields.items()})
    return paths


__all__ = ["COMMANDS", "STAGES", "Command", "Run", "leaf_paths"]
