"""Checks of a scored split as a whole: do its scores vary, reflect the preference, and survive the transform?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tisdpo_cli.engine.inspection.results import Check, SideSummary
from tisdpo_cli.engine.inspection.split_columns import SplitColumns
from tisdpo_cli.engine.inspection.summaries import separation


@dataclass(frozen=True)
class CheckBounds:
    """Bounds of the checks.

    Attributes:
        min_spread: standard deviation of r, in nats.
        min_separation: share of pairs separated by Σr.
        max_drift: change of mean r from the first to the last third of a response, in standard deviations of r.
        max_offset: offset of r on neutral tokens, in standard deviations of r.
        max_clipped: share of clipped scores on either side.
        max_unscored: share of truncated tokens.
    """

    min_spread: float
    min_separation: float
    max_drift: float
    max_offset: float
    max_clipped: float
    max_unscored: float


def check_split(
    columns: SplitColumns, bounds: CheckBounds, sides: Mapping[str, SideSummary], offset: float | None, final: bool
) -> list[Check]:
    """Check a split against bounds. Final weights have no scores to check.

    Args:
        columns: of scores or final weights.
        bounds: limits of the checks.
        sides: summaries by side.
        offset: of r on neutral tokens, in nats; None if unknown.
        final: whether they are final weights.
    """
    tokens = sum(side.tokens for side in sides.values())
    unscored = sum(side.unscored for side in sides.values()) / tokens if tokens else 0.0
    truncation = _check(
        "unscored tokens", unscored, bounds.max_unscored, False,
        "most tokens were truncated and have no score",
        "rerun `tisdpo estimate` with a larger --max-length",
    )  # fmt: skip
    if final:
        return [truncation]
    clipped = max(side.share_clipped for side in sides.values())
    return [*_score_checks(columns, bounds, offset, clipped), truncation]


def _score_checks(columns: SplitColumns, bounds: CheckBounds, offset: float | None, clipped: float) -> list[Check]:
    spread = float(columns.adjusted.tensor().std(correction=0))
    return [
        _check(
            "spread of r", spread, bounds.min_spread, True,
            "the scores barely vary: both contrastive models assign almost the same log-probs",
            "train the contrastive models longer, or with a shorter --warmup-steps or a higher --learning-rate; with "
            "prompt templates, use other templates or a model that follows them",
        ),
        _check(
            "pairs separated by Σr", separation(columns).accuracy, bounds.min_separation, True,
            "the scores do not reflect the preference: Σr is often higher for the rejected response",
            "check the held-out accuracy of both contrastive models, and that they were not swapped",
        ),
        _check(
            "drift with position", _in_spreads(_drift(columns), spread), bounds.max_drift, False,
            "r changes with the position in the response, whatever the token",
            "use --center position or --decay",
        ),
        _check(
            "offset on neutral tokens", _in_spreads(offset, spread), bounds.max_offset, False,
            "r is not centered on tokens that are equally common on both sides, and the transform amplifies the offset",
            "use --center dataset or --dead-zone",
        ),
        _check(
            "clipped scores", clipped, bounds.max_clipped, False,
            "the transform clips most scores of one side and loses their magnitude",
            "widen the clamp range (--L and --U of exp), or train the contrastive models for fewer steps",
        ),
    ]  # fmt: skip


def _check(name: str, value: float | None, bound: float, at_least: bool, says: str, fix: str) -> Check:
    passed = value is None or math.isnan(value) or (value >= bound if at_least else value <= bound)
    return Check(name, value, bound, at_least, passed, says, fix)


def _in_spreads(value: float | None, spread: float) -> float | None:
    return None if value is None or spread == 0 else value / spread


def _drift(columns: SplitColumns) -> float | None:
    """Difference of mean r between the first and the last third of the responses, in nats; None without tokens."""
    if not len(columns.thirds[0]):
        return None
    first, last = (float(values.tensor().mean()) for values in columns.thirds)
    return abs(first - last)
