"""Settings of `evaluate`."""

from __future__ import annotations

import re
from typing import ClassVar

from pydantic import field_validator, model_validator

from tisdpo_cli.settings.base import (
    MODEL,
    Command,
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
from tisdpo_cli.settings.groups import Data, Dtype


class Evaluate(Command):
    """Hold a model against its reference and another model: preferences, KL, samples, and rewards where given."""

    command: ClassVar[str] = "evaluate"

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
