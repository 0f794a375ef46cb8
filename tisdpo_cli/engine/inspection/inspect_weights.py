"""inspect-weights: compute what a scored dataset says about its tokens. The entry point; settings stop here.

It returns plain values (`results`) and knows no terminal and no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tisdpo_cli.data.scored import MANIFEST, SIDES, read_manifest
from tisdpo_cli.engine.arguments import chat_options, columns_of, parses, with_recorded_reading
from tisdpo_cli.engine.inspection.checks import CheckBounds, check_split
from tisdpo_cli.engine.inspection.comparison import compare_datasets, compare_recipes
from tisdpo_cli.engine.inspection.pair_views import PairViews, find_pair, sort_key, sort_pairs
from tisdpo_cli.engine.inspection.results import Comparison, Inspection
from tisdpo_cli.engine.inspection.summaries import (
    colour_scale,
    score_histogram,
    separation,
    side_summary,
    size_histogram,
)
from tisdpo_cli.engine.inspection.token_summaries import TokenIndex
from tisdpo_cli.engine.inspection.weighted_split import SplitOptions, WeightedSplit, read_weighted_split
from tisdpo_cli.method.recipe import Recipe
from tisdpo_cli.runs.outputs import versions
from tisdpo_cli.settings.inspect_weights import InspectWeights
from tisdpo_cli.settings.method_groups import is_recipe

# Names of recipes that are compared, apart from those of previews.
_COMPARED = "compare: "
# Pairs in a report without --limit: a page that opens at once.
_REPORT_PAIRS = 1000


def inspect_weights(settings: InspectWeights, command: str | None = None) -> Inspection:
    """Inspect the scores and weights of a scored dataset.

    Args:
        settings: of inspect-weights.
        command: command line, for the provenance.

    Raises:
        TisdpoError: the dataset is not scored, does not fit its tokenizer, or has no such split or pair.
    """
    settings = with_recorded_reading(settings, settings.scored)
    options = _split_options(settings)
    split = read_weighted_split(settings.scored, options)
    recipe, final = split.weighter.recipe, split.final
    shown = ["weights"] if final else ["weights", "scores", *(["adjusted"] if recipe.steps else [])]
    columns, previews = split.columns, list(_previews(settings, recipe))
    tokens = TokenIndex(columns, split.weighter.tokenizer, settings.min_count)
    highest, lowest = tokens.extremes("ranked", settings.top)
    heaviest, lightest = tokens.extremes("weights", settings.top)
    by_side = dict(zip(SIDES, columns.sides, strict=True))
    sides = {name: side_summary(side, not final, bool(recipe.steps)) for name, side in by_side.items()}
    checks = check_split(columns, _check_bounds(settings), sides, None if final else tokens.offset(), final)
    positions = _shown_pairs(settings, split)
    scales = {show: colour_scale(columns, show) for show in dict.fromkeys([*shown, settings.show, *previews])}
    return Inspection(
        source=settings.scored,
        split=settings.split,
        transform=recipe.describe(),
        show=settings.show,
        pairs=len(split),
        separation=None if final else separation(columns),
        sides=sides,
        ranked_by="weight" if final else "r after the steps" if recipe.steps else "r",
        highest=highest,
        lowest=lowest,
        heaviest=heaviest,
        lightest=lightest,
        scores=score_histogram(columns),
        sizes=size_histogram(columns),
        curves={show: {name: side.curves[show].means() for name, side in by_side.items()} for show in shown},
        scales=scales,
        checks=checks,
        comparison=_comparison(settings, options, split),
        notices=[*split.notices, *(f"{check.says}; {check.fix}" for check in checks if not check.passed)],
        views=PairViews(split, previews, positions),
        previews=previews,
        formulas=_formulas(settings, recipe),
        eos_weight=recipe.eos_weight,
        provenance=_provenance(settings.scored, split, command),
    )


# Settings as plain arguments -----------------------------------------------------------------------------------


def _split_options(settings: InspectWeights) -> SplitOptions:
    return SplitOptions(
        split=settings.split,
        columns=columns_of(settings.data),
        on_bad_row=settings.data.on_bad_row,
        parse_data=parses(settings.data),
        chat=chat_options(settings.data),
        tokenizer=settings.tokenizer,
        make_recipe=settings.weights.recipe,
        centered="center" in settings.weights.steps(),
        final=settings.weights.weights_are == "final",
        seed=settings.seed,
        others=lambda recipe: {**_previews(settings, recipe), **_compared(settings, recipe)},
        key=lambda pair: sort_key(settings.sort, pair, settings.weights.weights_are == "final"),
    )


def _check_bounds(settings: InspectWeights) -> CheckBounds:
    bounds = settings.checks
    return CheckBounds(
        min_spread=bounds.min_spread,
        min_separation=bounds.min_separation,
        max_drift=bounds.max_drift,
        max_offset=bounds.max_offset,
        max_clipped=bounds.max_clipped,
        max_unscored=bounds.max_unscored,
    )


def _other_recipe(settings: InspectWeights, spec: str, recipe: Recipe) -> Recipe:
    """Another transform with the steps and the EOS weight of the one in use."""
    return settings.weights.other_recipe(spec, eos_scores=recipe.eos_weight == "score")


def _previews(settings: InspectWeights, recipe: Recipe) -> dict[str, Recipe]:
    """Transforms that a report can switch to, by name, without the one in use."""
    if settings.html is None or recipe.final:
        return {}
    others = [_other_recipe(settings, spec, recipe) for spec in settings.previews.split()]
    return {other.name(): other for other in others if other != recipe}


def _formulas(settings: InspectWeights, recipe: Recipe) -> dict[str, str]:
    """The formula of the weights in use, and of each transform that a report can switch to."""
    every = {"weights": recipe.formula()} | {name: r.formula() for name, r in _previews(settings, recipe).items()}
    return {name: formula for name, formula in every.items() if formula is not None}


def _compared(settings: InspectWeights, recipe: Recipe) -> dict[str, Recipe]:
    """The transform that the one in use is compared with, by its description."""
    if settings.compare is None or not is_recipe(settings.compare):
        return {}
    other = _other_recipe(settings, settings.compare, recipe)
    return {_COMPARED + other.describe(): other}


def _shown_pairs(settings: InspectWeights, split: WeightedSplit) -> Sequence[int]:
    """Positions in the split of the pairs to show."""
    if settings.index is not None:
        return [find_pair(split, settings.index)]
    limit = settings.limit
    if limit is None and settings.table is None:
        limit = 1 if settings.html is None else _REPORT_PAIRS
    return sort_pairs(split, settings.sort, settings.seed)[:limit]


def _comparison(settings: InspectWeights, options: SplitOptions, split: WeightedSplit) -> Comparison | None:
    if settings.compare is None:
        return None
    if is_recipe(settings.compare):
        (name,) = _compared(settings, split.weighter.recipe)
        return compare_recipes(split, name, settings.top, settings.min_count)
    second = read_weighted_split(settings.compare, replace(options, others=lambda _recipe: {}))
    names = settings.scored, settings.compare
    return compare_datasets(split, second, names, settings.top, settings.min_count)


def _provenance(scored: str, split: WeightedSplit, command: str | None) -> dict[str, Any]:
    manifest = read_manifest(Path(scored).expanduser())
    return {
        **(manifest if manifest is not None else {"note": f"no {MANIFEST} in the dataset directory"}),
        "weights": split.weighter.recipe.describe(),
        "tokenizer in use": split.weighter.tokenizer.digest,
        "command": command,
        "shown by": versions(),
    }
