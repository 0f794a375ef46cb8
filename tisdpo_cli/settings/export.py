"""Settings of `export`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from tisdpo_cli.settings.base import Command, file_setting
from tisdpo_cli.settings.fields import PathText, setting


class Export(Command):
    """Write the responses of an evaluation in the format of a benchmark, to be judged there."""

    command: ClassVar[str] = "export"

    samples: PathText = setting(
        ..., "responses, from `tisdpo evaluate --samples`", "Data", shapes_result=False, metavar="FILE"
    )
    policy: PathText = setting(
        "model", "whose responses: model, baseline or reference, or the path of one of several models", "Data",
        shapes_result=False, metavar="ROLE|PATH",
    )  # fmt: skip
    name: PathText | None = setting(
        None, "name of the model in the benchmark (default: last part of its path; in --arena-hard that of the file)",
        "Output", shapes_result=False,
    )  # fmt: skip
    alpaca_eval: PathText | None = file_setting("write model outputs for AlpacaEval: a JSON list", "Output")
    arena_hard: PathText | None = file_setting("write model answers for Arena-Hard-Auto: JSON Lines", "Output")
    questions: PathText | None = setting(
        None, "question.jsonl of Arena-Hard-Auto, for the uid of each prompt", "Data", shapes_result=False,
        metavar="FILE",
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_format(self) -> Export:
        if (self.alpaca_eval is None) == (self.arena_hard is None):
            raise ValueError("give either --alpaca-eval FILE or --arena-hard FILE")
        for option, path, suffix in (
            ("alpaca_eval", self.alpaca_eval, "json"),
            ("arena_hard", self.arena_hard, "jsonl"),
        ):
            if path is not None and not path.endswith(f".{suffix}"):
                raise ValueError(f"{option}: the benchmark reads a file that ends with .{suffix}")
        if (self.arena_hard is None) != (self.questions is None):
            raise ValueError("questions belong to --arena-hard, which needs them")
        return self
