"""The settings of the commands that ask models and train none."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from tisdpo_cli.settings.base import (
    MODEL,
    RUNTIME,
    Command,
    output_setting,
    overwrite_setting,
    path_input,
    remote_code_setting,
    seed_setting,
)
from tisdpo_cli.settings.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seed,
    setting,
)
from tisdpo_cli.settings.groups import Checks, Data, Dtype, Layout, Reading, Weights, is_recipe, layout_setting
from tisdpo_cli.templates import TEMPLATES, template_text

# The two sides of the contrast that scores are made of.
CONTRAST = ("forward", "reverse")


def _template_help(side: str, default: str) -> str:
    names = ", ".join(TEMPLATES)
    return f"prompt of the {side} side: {names}, or text with {{}} for the prompt ({default} with --model)"


class Estimate(Command):
    """Score every response token under both contrastive models and write the dataset back with the scores.

    The two are --forward and --reverse, or one --model under two prompt templates.
    """

    forward: PathText | None = path_input("positive model π⁺, from `tisdpo train-dpo`", MODEL, default=None)
    reverse: PathText | None = path_input("negative model π⁻, from `tisdpo train-reverse`", MODEL, default=None)
    model: PathText | None = path_input(
        "one model for both, told apart by the templates", MODEL, "-m", "--model-name-or-path", default=None
    )
    positive_template: str | None = setting(None, _template_help("forward", "harmless"), MODEL, metavar="NAME|TEXT")
    negative_template: str | None = setting(None, _template_help("reverse", "harmful"), MODEL, metavar="NAME|TEXT")
    trust_remote_code: bool = remote_code_setting()
    dataset: PathText = path_input(
        "preference pairs to score: file (JSONL, JSON, CSV, Parquet), directory or hub id", "Data", "-d"
    )
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
        "auto", "go on where an interrupted run stopped", RUNTIME, shapes_result=False
    )
    overwrite: bool = overwrite_setting()

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

    scored: PathText = path_input("scored dataset, from `tisdpo estimate`", "Data", "--dataset", "-d")
    tokenizer: PathText | None = path_input("tokenizer, where none lies beside the data", MODEL, default=None)
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
    seed: Seed = seed_setting()
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

    model: PathText = path_input(
        "model to evaluate: directory or hub id; several checkpoints with commas between them",
        MODEL, "-m", "--model-name-or-path",
    )  # fmt: skip
    baseline: PathText | None = path_input("model to compare with", MODEL, default=None)
    ref_model: PathText = path_input("reference: the model that training started from", MODEL)
    trust_remote_code: bool = remote_code_setting()
    dataset: PathText = path_input(
        "preference pairs: file (JSONL, JSON, CSV, Parquet), directory or hub id", "Data", "-d"
    )
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
    reward_model: PathText | None = path_input(
        "sequence classification model whose one output is the reward", "Rewards", default=None
    )
    scorer: str | None = setting(
        None, "function that gets prompts and responses and gives rewards", "Rewards", metavar="MODULE:FUNCTION"
    )
    batch_size: PositiveInt = setting(16, "rows per forward pass", "Memory", "--per-device-eval-batch-size")
    dtype: Dtype = setting("auto", "compute in bf16 or float32 (auto: float32 on CPUs)", "Memory")
    seed: Seed = seed_setting()

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
