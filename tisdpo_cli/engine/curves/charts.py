"""Charts of curves as inline SVG, drawn by matplotlib: static, so that the page needs no script.

matplotlib writes colors and styles into every element. They become classes, whose colors are variables of the page:
one drawing for a light and a dark page, under a content security policy that forbids styles of other origin.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from tisdpo_cli.engine.curves.results import Point, RunComparison, thinned
from tisdpo_cli.text import visible

# Points of a curve at most: more than a chart has pixels to show.
MOST_POINTS = 300
SERIES = 8
# Told apart by more than color.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Colors that stand for variables of the page.
_INK, _GRID = "#100001", "#100002"
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--line)"} | {f"#20000{i}": f"var(--run-{i})" for i in range(SERIES)}


class Charts:
    """Draws the charts of a page, and collects the styles that they share."""

    def __init__(self, comparison: RunComparison) -> None:
        self._comparison = comparison
        self._classes: dict[str, str] = {}
        self._drawn = 0

    def css(self) -> str:
        """Rules for the classes of all charts so far."""
        rules = [f".{name}{{{_with_variables(style)}}}" for style, name in self._classes.items()]
        return "\n".join([".chart *{stroke-linejoin:round;stroke-linecap:butt}", *rules, ""])

    def chart(self, metric: str, title: str) -> Markup:
        """A metric of all runs by step, evaluations as points."""
        curves = {f"{i + 1}": run.series(metric) for i, run in enumerate(self._comparison.runs)}
        points = {f"{i + 1}": run.series(f"eval/{metric}") for i, run in enumerate(self._comparison.runs)}
        svg = _draw(curves, points, title)
        self._drawn += 1
        return Markup(self._cleaned(svg, f"c{self._drawn}-", self._alternative(title, metric)))

    def sample(self, number: int) -> Markup:
        """A piece of the line of a run, for the list of runs."""
        svg = _draw({f"{number}": [(0, 0.0), (1, 0.0)]}, {f"{number}": [(0, 0.0)]}, "", sample=True)
        self._drawn += 1
        return Markup(self._cleaned(svg, f"c{self._drawn}-", ""))

    def _alternative(self, title: str, metric: str) -> str:
        """A chart in words."""
        parts = []
        for number, run in enumerate(self._comparison.runs, start=1):
            series = run.series(metric) or run.series(f"eval/{metric}")
            if series:
                first, last = series[0], series[-1]
                parts.append(f"run {number} from {first[1]:.4g} at step {first[0]} to {last[1]:.4g} at step {last[0]}")
        return f"{title} by step: {'; '.join(parts)}"

    def _cleaned(self, svg: str, prefix: str, label: str) -> str:
        body = svg[svg.index("<svg") :]
        body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.S)
        body = re.sub(r'\bid="', f'id="{prefix}', body)
        body = re.sub(r"url\(#", f"url(#{prefix}", body)
        body = re.sub(r'href="#', f'href="#{prefix}', body)
        body = re.sub(r'style="([^"]*)"', lambda found: f'class="{self._class(found[1])}"', body)
        opening = re.match(r"<svg[^>]*>", body)
        box = re.search(r'viewBox="([^"]*)"', opening[0]) if opening else None
        assert opening is not None
        assert box is not None
        kind = f'role="img" aria-label="{escape(visible(label))}"' if label else 'aria-hidden="true"'
        head = f'<svg class="chart" viewBox="{box[1]}" xmlns:xlink="http://www.w3.org/1999/xlink" {kind}>'
        return head + body[opening.end() :].strip()

    def _class(self, style: str) -> str:
        return self._classes.setdefault(style, f"s{len(self._classes)}")


def _with_variables(style: str) -> str:
    return re.sub("|".join(_VARIABLES), lambda found: _VARIABLES[found[0]], style)


def _draw(
    curves: Mapping[str, Sequence[Point]], points: Mapping[str, Sequence[Point]], title: str, sample: bool = False
) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings = {
        **matplotlib.rcParamsDefault,
        "svg.fonttype": "none",
        "svg.hashsalt": "tisdpo",
        "text.parse_math": False,
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK),
        "grid.color": _GRID,
    }
    settings = {name: value for name, value in settings.items() if name != "backend"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(0.6, 0.2) if sample else (4.6, 2.5), layout=None if sample else "constrained")
        figure.patch.set_visible(False)
        axes = figure.add_axes((0, 0, 1, 1)) if sample else figure.subplots()
        axes.patch.set_visible(False)
        for number in curves:
            _line(axes, int(number) - 1, curves[number], points[number])
        if sample:
            axes.set_axis_off()
        else:
            axes.set_xlabel("step")
            axes.grid(visible=True, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            if sum(bool(curves[number] or points[number]) for number in curves) > 1:
                axes.legend(frameon=False, title="run", ncols=2 if len(curves) > 4 else 1)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return written.getvalue()


def _line(axes: Any, at: int, curve: Sequence[Point], points: Sequence[Point]) -> None:
    color, marker = f"#20000{at % SERIES}", _MARKERS[at % len(_MARKERS)]
    label = str(at + 1)
    if curve:
        steps, values = zip(*thinned(curve, MOST_POINTS), strict=True)
        # Where colors begin again, dashes do not.
        dashes = _DASHES[(at + at // SERIES) % len(_DASHES)]
        # A run of one step is a point.
        alone = "." if len(steps) == 1 else None
        axes.plot(steps, values, color=color, linestyle=dashes, linewidth=1.4, label=label, marker=alone)
    if points:
        steps, values = zip(*thinned(points, MOST_POINTS), strict=True)
        own = {} if curve else {"label": label}
        axes.plot(steps, values, color=color, linestyle=(0, (1, 3)), linewidth=0.8, marker=marker, markersize=5, **own)
