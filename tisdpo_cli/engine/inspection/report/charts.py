"""Charts of the report as inline SVG, without scripts or style attributes; colours come from CSS classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from tisdpo_cli.engine.inspection.results import Histogram

_WIDTH, _HEIGHT = 420, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 26
Point = tuple[float, float]


def histogram_chart(histogram: Histogram, label: str, x_format: str = ".2f") -> Markup:
    """Shares of both sides as stepped lines, on a square-root scale because a few bins hold most values."""
    edges = histogram.edges
    tallest = max((max(c) / max(1, sum(c)) for c in histogram.counts.values()), default=0.0) or 1.0
    frame = _Frame((edges[0], edges[-1]), (0.0, tallest), square_root=True)
    lines = []
    for side, counts in histogram.counts.items():
        points = [(edges[0], 0.0)]
        for i, count in enumerate(counts):
            share = count / max(1, sum(counts))
            points += [(edges[i], share), (edges[i + 1], share)]
        lines.append(frame.line([*points, (edges[-1], 0.0)], side))
    return frame.svg(label, lines, x_format, ".1%")


def curves_chart(curves: Mapping[str, Sequence[float]], label: str, neutral: float) -> Markup:
    """Means of both sides by relative position, with a line at the neutral value."""
    values = [value for means in curves.values() for value in means] + [neutral]
    low, high = min(values), max(values)
    frame = _Frame((0.0, 1.0), (low, high if high > low else low + 1e-6))
    lines = [frame.line([(0.0, neutral), (1.0, neutral)], "neutral")]
    for side, means in curves.items():
        lines.append(frame.line([((i + 0.5) / len(means), mean) for i, mean in enumerate(means)], side))
    return frame.svg(label, lines, ".0%", ".3f")


def roc_chart(points: Sequence[Point], label: str) -> Markup:
    """ROC curve: share of chosen over share of rejected responses at or above a threshold."""
    frame = _Frame((0.0, 1.0), (0.0, 1.0))
    lines = [frame.line([(0.0, 0.0), (1.0, 1.0)], "neutral"), frame.line(points, "chosen")]
    return frame.svg(label, lines, ".0%", ".0%")


class _Frame:
    """Axes and the mapping from values to SVG coordinates."""

    def __init__(self, x: Point, y: Point, square_root: bool = False) -> None:
        self.x, self.y, self.square_root = x, y, square_root

    def coordinates(self, point: Point) -> str:
        across = (point[0] - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        up = (point[1] - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        up = math.sqrt(up) if self.square_root else up
        x = _LEFT + across * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    def line(self, points: Sequence[Point], kind: str) -> Markup:
        coordinates = " ".join(map(self.coordinates, points))
        return Markup('<polyline class="{}" points="{}"/>').format(f"line {kind}", coordinates)

    def svg(self, label: str, lines: Sequence[Markup], x_format: str, y_format: str) -> Markup:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        middle = (self.x[0] + self.x[1]) / 2
        labels = [
            _tick(_LEFT, _HEIGHT - 8, "start", format(self.x[0], x_format)),
            _tick((_LEFT + right) / 2, _HEIGHT - 8, "middle", format(middle, x_format)),
            _tick(right, _HEIGHT - 8, "end", format(self.x[1], x_format)),
            _tick(_LEFT - 4, bottom, "end", format(self.y[0], y_format)),
            _tick(_LEFT - 4, _TOP + 8, "end", format(self.y[1], y_format)),
        ]
        axes = Markup(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
        body = Markup("").join([axes, *lines, *labels])
        return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            _WIDTH, _HEIGHT, label, body
        )


def _tick(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup(f'<text class="label" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>')
