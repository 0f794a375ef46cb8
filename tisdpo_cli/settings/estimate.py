"""Settings of `estimate`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from tisdpo_cli.method.prompt_templates import TEMPLATES, template_text
from tisdpo_cli.settings.base import (
    MODEL,
    RUNTIME,
    Command,
    output_setting,
    overwrite_setting,
    path_input,
    remote_code_setting,
)
from tisdpo_cli.settings.fields import (
    PathText,
    PositiveInt,
    setting,
)
from tisdpo_cli.settings.groups import Data, Dtype, Layout, layout_setting

# The two sides of the contrast that scores are made of.
CONTRAST = ("forward", "reverse")


def _template_help(side: str, default: str) -> str:
    names = ", ".join(TEMPLATES)
    return f"prompt of the {side} side: {names}, or text with {{}} for the prompt ({default} with --model)"


class Estimate(Command):
    """Score every response token under both contrastive models and write the dataset back with the scores.

    The two are --forward and --reverse, or one --model under two prompt templates.
    """

    command: ClassVar[str] = "estimate"

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
