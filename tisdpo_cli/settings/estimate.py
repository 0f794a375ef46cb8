"""Settings of `estimate`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from tisdpo_cli.method.prompt_templates import TEMPLATES, template_text
from tisdpo_cli.settings.base import (
    Command,
    Resume,
    dry_run_setting,
    model_setting,
    num_processes_setting,
    output_setting,
    overwrite_setting,
    pairs_setting,
    remote_code_setting,
    resume_setting,
)
from tisdpo_cli.settings.datasets import DatasetValue
from tisdpo_cli.settings.fields import PathText, PositiveInt, setting
from tisdpo_cli.settings.groups import Dtype, Layout, TrainingData, dtype_setting, layout_setting

# The two sides of the contrast that scores are made of.
CONTRAST = ("forward", "reverse")


def _template_setting(side: str, default: str) -> Any:
    return setting(
        None,
        f"prompt template of the {side} side: {', '.join(TEMPLATES)}, or text with {{}} for the prompt "
        f"(default: normal; {default} with --model)",
        "Model",
        metavar="NAME|TEXT",
    )


class Estimate(Command):
    """Score every response token under both contrastive models and write the dataset back with the scores.

    Give --forward and --reverse, or one --model with two prompt templates.
    """

    command: ClassVar[str] = "estimate"

    forward: PathText | None = model_setting("positive model π⁺, from `tisdpo train-dpo`", default=None)
    reverse: PathText | None = model_setting("negative model π⁻, from `tisdpo train-reverse`", default=None)
    model: PathText | None = model_setting(
        "use one model for both sides, distinguished by prompt templates", "-m", "--model-name-or-path", default=None
    )
    positive_template: str | None = _template_setting("forward", "harmless")
    negative_template: str | None = _template_setting("reverse", "harmful")
    trust_remote_code: bool = remote_code_setting()
    dataset: DatasetValue = pairs_setting()
    data: TrainingData = TrainingData()
    keep_logps: bool = setting(False, "also write the log-probs under both models, as extra columns", "Data")
    batch_size: PositiveInt = setting(
        16, "pairs per forward pass on each process", "Memory", "--per-device-eval-batch-size"
    )
    sequential: bool = setting(False, "keep one model in memory at a time", "Memory", shapes_result=False)
    dtype: Dtype = dtype_setting("float32")
    layout: Layout = layout_setting()
    output_dir: PathText = output_setting()
    format: Literal["jsonl", "parquet"] = setting("jsonl", "file format of the scored dataset", "Output")
    overwrite: bool = overwrite_setting()
    resume: Resume = resume_setting(paths=False)
    num_processes: PositiveInt = num_processes_setting()
    dry_run: bool = dry_run_setting()

    def templates(self) -> dict[str, str]:
        """The template text of each side; without templates, prompts are unchanged where there are two models."""
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
        """Side to the model given for it."""
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
        given = (self.forward is not None) + (self.reverse is not None)
        if self.model is None and given < 2:
            missing = [f"--{side}" for side in CONTRAST if getattr(self, side) is None]
            verb = "are" if len(missing) > 1 else "is"
            raise ValueError(f"{' and '.join(missing)} {verb} required, or one --model for both sides")
        if self.model is not None and given:
            raise ValueError("give --forward and --reverse, or one --model for both sides, but not all")
        return self
