"""Settings of `inspect-weights`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from tisdpo_cli.settings.base import Command, dataset_setting, file_setting, seed_setting
from tisdpo_cli.settings.fields import NonNegativeInt, PathText, PositiveInt, Seed, setting
from tisdpo_cli.settings.groups import Checks, ColumnOptions
from tisdpo_cli.settings.method_groups import Weights, is_recipe


class InspectWeights(Command):
    """Show what the weights say: a summary of the scored dataset, and a pair token by token."""

    command: ClassVar[str] = "inspect-weights"

    scored: PathText = dataset_setting("scored dataset, from `tisdpo estimate`", "--dataset", "-d")
    tokenizer: PathText | None = setting(
        None, "tokenizer, if there is none beside the dataset", "Model", shapes_result=False, metavar="PATH"
    )
    split: str = setting("train", "split to show", "Data")
    data: ColumnOptions = ColumnOptions()
    weights: Weights = Weights()
    index: NonNegativeInt | None = setting(None, "pair to show (0 is the first)", "View", "-i")
    sort: Literal["spread", "max-weight", "min-mean", "random", "index"] = setting(
        "spread", "order of pairs: by spread of r, highest weight, lowest mean weight, at random, or by index", "View"
    )
    limit: PositiveInt | None = setting(
        None, "number of pairs to show (default: 1; 1000 in --html; all in --table)", "View", "-n"
    )
    show: Literal["weights", "scores", "adjusted"] = setting(
        "weights", "color tokens by weight, by score r, or by r after the steps", "View"
    )
    top: PositiveInt = setting(8, "number of tokens in the lists of highest and lowest", "View")
    min_count: PositiveInt = setting(5, "minimum occurrences of a token in these lists", "View")
    compare: str | None = setting(
        None,
        "compare with another transform, as name:param=value,…, or with another scored dataset",
        "View",
        metavar="TRANSFORM|PATH",
    )
    previews: str = setting(
        "exp rank_based threshold_and_scale binary:top_percent=50",
        "transforms to switch between in --html, each as name:param=value,…",
        "View",
        metavar="NAMES",
    )
    check: bool = setting(False, "exit with code 1 if a check fails", "Checks", shapes_result=False)
    checks: Checks = Checks()
    html: PathText | None = file_setting("write a self-contained HTML report", "Output")
    table: PathText | None = file_setting(
        "write a CSV file with one row per token, and FILE.json with its origin", "Output"
    )
    svg: PathText | None = file_setting("write the view as an SVG image", "Output")
    seed: Seed = seed_setting()

    @model_validator(mode="after")
    def _shows_what_there_is(self) -> InspectWeights:
        final = self.weights.weights_are == "final"
        if final and self.show != "weights":
            raise ValueError("a file of final weights has no scores to show")
        named = self.compare is not None and is_recipe(self.compare)
        if final and named:
            raise ValueError("a file of final weights has no scores for another transform")
        for spec in [*self.previews.split(), *([self.compare] if named and self.compare else [])]:
            self.weights.other_recipe(spec, eos_scores=True)
        return self
