"""The page with the curves of several runs: one file that works offline, without scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from tisdpo_cli.engine.curves.charts import MOST_POINTS, Charts
from tisdpo_cli.engine.curves.results import RunComparison, RunCurves
from tisdpo_cli.engine.offline_page import asset, source_hash, template_environment
from tisdpo_cli.text import visible

_PACKAGE = "tisdpo_cli.engine.curves"
# Rows of the table beneath a chart.
_ROWS = 12


def page(comparison: RunComparison) -> str:
    """Render the page."""
    charts = Charts(comparison)
    drawn = [
        {"title": title, "svg": charts.chart(metric, title), "rows": _rows(comparison.runs, metric)}
        for metric, title in comparison.drawn().items()
    ]
    samples = [charts.sample(number) for number in range(1, len(comparison.runs) + 1)]
    style = asset(_PACKAGE, "page.css") + charts.css()
    return (
        _environment()
        .get_template("page.html")
        .render(
            comparison=comparison,
            charts=drawn,
            samples=samples,
            style=Markup(style),
            policy=f"default-src 'none'; style-src '{source_hash(style)}'; base-uri 'none'; form-action 'none'",
            settings={name: list(map(_shown, values)) for name, values in comparison.settings().items()},
            final=comparison.final(),
            most=MOST_POINTS,
        )
    )


@cache
def _environment() -> Environment:
    environment = template_environment(_PACKAGE)
    environment.filters |= {"visible": visible, "figure": _figure}
    return environment


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _rows(runs: Sequence[RunCurves], metric: str) -> list[tuple[int, list[float | None], list[float | None]]]:
    """Some steps with the values of every run, and of its evaluation, at that step."""
    curves = [dict(run.series(metric)) for run in runs]
    points = [dict(run.series(f"eval/{metric}")) for run in runs]
    evaluated = sorted({step for values in points for step in values})
    steps = sorted({*_some(sorted({step for values in curves for step in values})), *_some(evaluated)})
    return [(step, [values.get(step) for values in curves], [values.get(step) for values in points]) for step in steps]


def _some(steps: Sequence[int]) -> list[int]:
    """A few of the steps, the first and the last among them."""
    if len(steps) <= _ROWS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (_ROWS - 1))] for i in range(_ROWS)]
