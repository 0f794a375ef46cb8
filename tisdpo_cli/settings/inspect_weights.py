"""Settings of `inspect-weights`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from tisdpo_cli.settings.base import (
    MODEL,
    Command,
    path_input,
    seed_setting,
)
from tisdpo_cli.settings.fields import (
    NonNegativeInt,
    PathText,
    PositiveInt,
    Seed,
    setting,
)
from tisdpo_cli.settings.groups import Checks, ColumnOptions, Weights, is_recipe


class InspectWeights(Command):
    """Show what the weights say: a summary of the file, and a pair token by token."""

    command: ClassVar[str] = "inspect-weights"

    scored: PathText = path_input("scored dataset, from `tisdpo estimate`", "Data", "--dataset", "-d")
    tokenizer: PathText | None = path_input("tokenizer, where none lies beside the data", MODEL, default=None)
    split: str = setting("train", "split to show", "Data")
    data: ColumnOptions = ColumnOptions()
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
