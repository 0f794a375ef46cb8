"""Reward against KL as a picture: an SVG that stands alone, made by code. It knows points and names only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Point = tuple[float, float]
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 170, 20, 50
# Told apart by colour and by dashes.
_LOOKS = (
    ("#1f4e9c", ""), ("#6a8fd0", "6 3"), ("#c4500c", ""), ("#e08a2e", "8 3 2 3"), ("#2f7d5b", "4 2"),
    ("#777777", "2 3"), ("#8c4fa3", "10 4"), ("#a0522d", "3 3"),
)  # fmt: skip


def curves(of: Mapping[str, Sequence[Point]], across: str, up: str, farthest: float) -> str:
    """Lines through points, one for each name, as far as `farthest` to the right."""
    shown = {name: [p for p in points if p[0] <= farthest] for name, points in of.items()}
    heights = [y for points in shown.values() for _, y in points]
    low, high = min(heights), max(heights)
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def at(x: float, y: float) -> Point:
        return _LEFT + x / farthest * (right - _LEFT), bottom - (y - low) / (high - low or 1) * (bottom - _TOP)

    parts = [f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#444"/>']
    for i in range(5):
        x, y = farthest * i / 4, low + (high - low) * i / 4
        parts.append(_text(at(x, low)[0], bottom + 18, f"{x:.1f}", "middle"))
        parts.append(_text(_LEFT - 6, at(0, y)[1] + 4, f"{y:.1f}", "end"))
    for i, (name, points) in enumerate(shown.items()):
        colour, dashes = _LOOKS[i % len(_LOOKS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in sorted(points)))
        pen = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{line}" {pen}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in (at(*p) for p in points)]
        height = _TOP + 16 + 20 * i
        parts.append(f'<path d="M{right + 12} {height - 4}h28" {pen}/>')
        parts.append(_text(right + 46, height, name, "start"))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 10, across, "middle"))
    parts.append(f'<g transform="rotate(-90 16 {(_TOP + bottom) / 2:.0f})">')
    parts.append(_text(16, (_TOP + bottom) / 2, up, "middle") + "</g>")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{up}">'
    return f'{head}<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"'
    return f'<text {place} font-family="sans-serif" font-size="13" fill="#222">{escape(text)}</text>'
