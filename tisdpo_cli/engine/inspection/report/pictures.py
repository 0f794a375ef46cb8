"""The pictures of the report as inline SVG: no script, no style attribute, colours by class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from tisdpo_cli.engine.inspection.results import Histogram

_WIDTH, _HEIGHT = 420, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 26
Point = tuple[float, float]


def histogram(of: Histogram, name: str, form: str = ".2f") -> Markup:
    """Shares of both sides as stepped lines, on a square-root scale: most values lie in a few bins."""
    tallest = max((max(c) / max(1, sum(c)) for c in of.counts.values()), default=0.0) or 1.0
    frame = _Frame((of.edges[0], of.edges[-1]), (0.0, tallest), root=True)
    lines = []
    for side, counts in of.counts.items():
        share = [count / max(1, sum(counts)) for count in counts]
        points = [(of.edges[0], 0.0)]
        for i, height in enumerate(share):
            points += [(of.edges[i], height), (of.edges[i + 1], height)]
        lines.append(frame.line([*points, (of.edges[-1], 0.0)], side))
    return frame.picture(name, lines, form, ".1%")


def curves(of: Mapping[str, Sequence[float]], name: str, neutral: float) -> Markup:
    """Means by relative position, with a line at neutral."""
    values = [value for side in of.values() for value in side] + [neutral]
    low, high = min(values), max(values)
    frame = _Frame((0.0, 1.0), (low, high if high > low else low + 1e-6))
    lines = [frame.line([(0.0, neutral), (1.0, neutral)], "neutral")]
    for side, means in of.items():
        lines.append(frame.line([((i + 0.5) / len(means), mean) for i, mean in enumerate(means)], side))
    return frame.picture(name, lines, ".0%", ".3f")


def roc(points: Sequence[Point], name: str) -> Markup:
    """The share of chosen responses above a threshold by the share of rejected ones."""
    frame = _Frame((0.0, 1.0), (0.0, 1.0))
    lines = [frame.line([(0.0, 0.0), (1.0, 1.0)], "neutral"), frame.line(points, "chosen")]
    return frame.picture(name, lines, ".0%", ".0%")


class _Frame:
    """Axes, and where values lie between them."""

    def __init__(self, x: Point, y: Point, root: bool = False) -> None:
        self.x, self.y, self.root = x, y, root

    def at(self, point: Point) -> str:
        across = (point[0] - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = (point[1] - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        up = math.sqrt(up) if self.root else up
        x = _LEFT + across * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    def line(self, points: Sequence[Point], kind: str) -> Markup:
        return Markup('<polyline class="{}" points="{}"/>').format(f"line {kind}", " ".join(map(self.at, points)))

    def picture(self, name: str, lines: Sequence[Markup], across: str, up: str) -> Markup:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        middle = (self.x[0] + self.x[1]) / 2
        labels = [
            _label(_LEFT, _HEIGHT - 8, "start", format(self.x[0], across)),
            _label((_LEFT + right) / 2, _HEIGHT - 8, "middle", format(middle, across)),
            _label(right, _HEIGHT - 8, "end", format(self.x[1], across)),
            _label(_LEFT - 4, bottom, "end", format(self.y[0], up)),
            _label(_LEFT - 4, _TOP + 8, "end", format(self.y[1], up)),
        ]
        axes = Markup(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
        body = Markup("").join([axes, *lines, *labels])
        return Markup('<svg class="picture" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            _WIDTH, _HEIGHT, name, body
        )


def _label(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup(f'<text class="label" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>')
