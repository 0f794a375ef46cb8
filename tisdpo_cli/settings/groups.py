"""The groups of settings that commands share."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, field_validator, model_validator

from tisdpo_cli.formats import DataFormat
from tisdpo_cli.settings.base import resume_setting
from tisdpo_cli.settings.fields import (
    Group,
    JsonObject,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    setting,
)

# As the hub names repositories.
_REPO = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}(?<![.-])(?<!\.git)", re.ASCII)
Dtype = Literal["auto", "float32", "bf16"]
Layout = Literal["auto", "shared-prefix", "separate"]


def dtype_setting(auto: str) -> Any:
    """`--dtype`, with what `auto` means."""
    return setting("auto", f"compute in bf16 or float32 (auto: {auto})", "Memory")


def layout_setting() -> Any:
    """`--layout`, the same for every command that runs a model over pairs."""
    return setting(
        "auto",
        "shared-prefix: encode each prompt once for both responses; separate: one row per response; auto: "
        "shared-prefix where it is numerically equivalent",
        "Memory",
    )


class ColumnOptions(Group):
    """How rows are read."""

    prompt_column: str = setting("prompt", "name of the prompt column", "Data")
    chosen_column: str = setting("chosen", "name of the column with the preferred response", "Data")
    rejected_column: str = setting("rejected", "name of the column with the other response", "Data")
    on_bad_row: Literal["error", "skip"] = setting("error", "stop at unusable rows, or skip them", "Data")
    special_tokens_in_data: Literal["text", "parse"] = setting(
        "text", "special tokens spelled out in rows are plain text, or parsed if a chat template rendered them", "Data"
    )
    dialogue: Literal["none", "hh"] = setting(
        "none", "hh: texts are dialogues with turns of Human: and Assistant:, to be read as messages", "Data"
    )
    chat_template: PathText | None = setting(
        None,
        "file of the chat template for rows of messages (default: the tokenizer's)",
        "Data",
        shapes_result=False,
        metavar="FILE",
    )
    chat_template_kwargs: JsonObject | None = setting(
        None, "variables of the chat template, as a JSON object", "Data", metavar="JSON"
    )
    chat_date: str | None = setting(
        None, "day that a chat template writes (default: 2025-01-01)", "Data", metavar="YYYY-MM-DD"
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _is_an_object(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                found = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError("must be a JSON object") from error
            if not isinstance(found, dict):
                raise ValueError("must be a JSON object")
        return value

    @field_validator("chat_date")
    @classmethod
    def _is_a_day(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                date.fromisoformat(value)
            except ValueError as error:
                raise ValueError("must be a day, as in 2025-01-31") from error
        return value

    def template_variables(self) -> dict[str, Any]:
        """The variables of the chat template."""
        return json.loads(self.chat_template_kwargs) if self.chat_template_kwargs else {}


class Data(ColumnOptions):
    """How rows are read and truncated."""

    data_format: DataFormat = setting(
        "pairs", f"what a row holds: {', '.join(get_args(DataFormat))}", "Data", metavar="NAME"
    )
    max_length: PositiveInt = setting(512, "maximum tokens of prompt and response together", "Data")
    max_prompt_length: PositiveInt = setting(256, "maximum prompt tokens in rows that exceed --max-length", "Data")
    keep_prompt: Literal["end", "start"] = setting("end", "part of a truncated prompt to keep", "Data")

    @classmethod
    def of_mixture(cls) -> dict[str, Any]:
        """The settings for the columns of a scored mixture, whatever they are in its parts."""
        names = ("prompt_column", "chosen_column", "rejected_column", "dialogue")
        return {f"data.{name}": cls.model_fields[name].default for name in names}

    @model_validator(mode="after")
    def _names_columns_of_pairs(self) -> Data:
        columns = ("prompt_column", "chosen_column", "rejected_column")
        given = [name for name in columns if getattr(self, name) != type(self).model_fields[name].default]
        if given and self.data_format not in ("pairs", "scored-pairs"):
            raise ValueError(f"{given[0]} is for pairs; rows of data_format {self.data_format} have their own columns")
        return self

    @model_validator(mode="after")
    def _leaves_room_for_a_response(self) -> Data:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}), "
                "or no response token is left"
            )
        return self


def _rows_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a number of rows, or a share below 1")
    return int(value) if value >= 1 else value


class TrainingData(Data):
    """How rows are chosen, read and truncated where a dataset is split into training and evaluation."""

    split: PathText = setting("train", "training split", "Data", "--dataset-train-split", metavar="NAME")
    eval_split: PathText | None = setting(
        None, "evaluation split (default: test, or validation and the like)", "Data", "--dataset-test-split",
        metavar="NAME",
    )  # fmt: skip
    limit: PositiveInt | None = setting(None, "use only the first N rows of the training split", "Data")
    eval_size: Annotated[PositiveFloat, AfterValidator(_rows_or_share)] | None = setting(
        None, "hold out N rows of the training split, or a share of them, to evaluate on", "Data",
        "--test-split-size", metavar="N|SHARE",
    )  # fmt: skip

    @classmethod
    def of_scored_dataset(cls) -> dict[str, Any]:
        """The settings that `estimate` has applied to the rows of a scored dataset, with what they are for it."""
        names = ("data_format", "split", "eval_split", "limit", "eval_size")
        return {f"data.{name}": cls.model_fields[name].default for name in names}

    @model_validator(mode="after")
    def _one_test_split(self) -> TrainingData:
        if self.eval_split is not None and self.eval_size is not None:
            raise ValueError("give either eval_split or eval_size, not both")
        return self


class SftData(TrainingData):
    """How rows are read and truncated in train-sft, which also takes instruction rows."""

    instruction_template: str = setting(
        "\n\nHuman: {instruction}\n\nAssistant:",
        "prompt of an instruction row, with {instruction} for its instruction and input",
        "Data",
    )

    @model_validator(mode="after")
    def _has_one_placeholder(self) -> SftData:
        if self.instruction_template.count("{instruction}") != 1:
            raise ValueError("instruction_template must contain {instruction} exactly once")
        return self


class Memory(Group):
    """What decides the size of a forward pass; changes nothing but rounding."""

    tokens_per_microbatch: PositiveInt | None = setting(
        None, "token budget per forward pass on each process (default: from model size and device memory)", "Memory"
    )
    micro_batch_size: PositiveInt | None = setting(
        None,
        "pairs per forward pass on each process, instead of a token budget",
        "Memory",
        "--per-device-train-batch-size",
    )
    gradient_accumulation: PositiveInt | None = setting(
        None, "forward passes per optimizer step, instead of a token budget", "Memory", "--gradient-accumulation-steps"
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, more time", "Memory"
    )
    liger_kernel: bool = setting(
        False,
        "compute norms, rotary positions and activations with Liger's kernels; needs a GPU and liger-kernel",
        "Memory",
        "--use-liger-kernel",
    )
    shard: Literal["auto", "none", "full"] = setting(
        "auto",
        "full: split the model over the processes (FSDP2); auto: as the launcher's configuration says",
        "Memory",
        shapes_result=False,
    )
    cpu_offload: bool = setting(
        False, "keep shards in CPU memory while they are not in use; needs --shard full", "Memory", shapes_result=False
    )
    dtype: Dtype = dtype_setting("bf16 on GPUs that support it")
    layout: Layout = layout_setting()

    @model_validator(mode="after")
    def _offloads_shards(self) -> Memory:
        if self.cpu_offload and self.shard != "full":
            raise ValueError("cpu_offload keeps shards in CPU memory: set shard to full")
        return self

    @model_validator(mode="after")
    def _one_measure(self) -> Memory:
        if self.tokens_per_microbatch is not None and (self.micro_batch_size or self.gradient_accumulation):
            raise ValueError(
                "give either tokens_per_microbatch, or micro_batch_size and gradient_accumulation: both decide how a "
                "batch is split"
            )
        return self


class Checkpoints(Group):
    """Saving and resuming."""

    save_every: PositiveInt | None = setting(
        500, "save a checkpoint every N steps, and when interrupted", "Output", "--save-steps", shapes_result=False
    )
    keep_checkpoints: PositiveInt = setting(
        2, "number of checkpoints to keep while training", "Output", "--save-total-limit", shapes_result=False
    )
    resume: str = resume_setting(paths=True)


class Hub(Group):
    """Sharing the trained model."""

    push_to_hub: PathText | None = setting(
        None, "upload the finished model to this repository of the Hugging Face hub, as the login of `hf auth login`",
        "Sharing", shapes_result=False, repeated=False, metavar="REPO",
    )  # fmt: skip
    hub_private: bool = setting(
        True, "make a new repository private (default), or public", "Sharing", shapes_result=False, repeated=False
    )

    @field_validator("push_to_hub")
    @classmethod
    def _is_a_repository(cls, value: str | None) -> str | None:
        named = value is None or (_REPO.fullmatch(value) and "--" not in value and ".." not in value)
        # In other trainers it is a flag, which must not name a repository.
        if not named or str(value).lower() in ("true", "false"):
            raise ValueError("must be the repository: NAME or OWNER/NAME")
        return value


class Checks(Group):
    """Bounds for the scores of a file. A check without a value passes."""

    min_spread: NonNegativeFloat = setting(0.01, "minimum spread of r, in nats", "Checks")
    min_separation: NonNegativeFloat = setting(0.55, "minimum share of pairs that Σr separates", "Checks")
    max_drift: NonNegativeFloat = setting(
        1.0, "maximum change of r from first to last third, in spreads of r", "Checks"
    )
    max_offset: NonNegativeFloat = setting(
        0.5, "maximum offset of r on tokens common to both sides, in spreads of r", "Checks"
    )
    max_clipped: NonNegativeFloat = setting(0.5, "maximum share of clipped scores", "Checks")
    max_unscored: NonNegativeFloat = setting(0.5, "maximum share of truncated tokens", "Checks")
