"""Settings of `evaluate`."""

from __future__ import annotations

import re
from typing import ClassVar

from pydantic import field_validator, model_validator

from tisdpo_cli.settings.base import (
    Command,
    dry_run_setting,
    file_setting,
    model_setting,
    num_processes_setting,
    pairs_setting,
    remote_code_setting,
    seed_setting,
)
from tisdpo_cli.settings.datasets import DatasetValue
from tisdpo_cli.settings.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seed,
    setting,
)
from tisdpo_cli.settings.groups import Data, Dtype, dtype_setting


class Evaluate(Command):
    """Compare a model with its reference and a baseline: preferences, KL, samples, and rewards."""

    command: ClassVar[str] = "evaluate"

    model: PathText = model_setting(
        "model to evaluate: directory or hub id, or a comma-separated list of checkpoints",
        "-m", "--model-name-or-path",
    )  # fmt: skip
    baseline: PathText | None = model_setting("model to compare with", default=None)
    ref_model: PathText = model_setting("reference model: the one that training started from")
    trust_remote_code: bool = remote_code_setting()
    dataset: DatasetValue = pairs_setting()
    split: str | None = setting(None, "split to evaluate (default: test if there is one)", "Data")
    data: Data = Data()
    batch_size: PositiveInt = setting(16, "rows per forward pass", "Memory", "--per-device-eval-batch-size")
    dtype: Dtype = dtype_setting("float32")
    beta: PositiveFloat = setting(0.1, "β of the implicit rewards β log π/π_ref", "Evaluation")
    eval_pairs: PositiveInt = setting(256, "number of pairs to evaluate, from the start of the split", "Evaluation")
    sample_prompts: NonNegativeInt = setting(
        64, "number of prompts to generate responses for (0 disables generation)", "Samples"
    )
    samples_per_prompt: PositiveInt = setting(1, "responses per prompt", "Samples")
    max_new_tokens: PositiveInt = setting(128, "maximum tokens of a generated response", "Samples")
    temperature: NonNegativeFloat = setting(1.0, "sampling temperature (0 = greedy)", "Samples")
    samples: PathText | None = file_setting("write all responses side by side, as JSON Lines", "Samples")
    reward_model: PathText | None = model_setting(
        "reward model: sequence classification with one output", default=None, panel="Rewards"
    )
    scorer: str | None = setting(
        None, "function that returns rewards for lists of prompts and responses", "Rewards",
        metavar="MODULE:FUNCTION",
    )  # fmt: skip
    seed: Seed = seed_setting()
    num_processes: PositiveInt = num_processes_setting()
    dry_run: bool = dry_run_setting()

    def models(self) -> list[str]:
        """The models to evaluate, as given."""
        return [name.strip() for name in self.model.split(",")]

    @model_validator(mode="after")
    def _is_consistent(self) -> Evaluate:
        if not all(self.models()):
            raise ValueError("model: a name in the list is empty; write A,B,C")
        if self.reward_model is not None and self.scorer is not None:
            raise ValueError("give either reward_model or scorer, not both")
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
