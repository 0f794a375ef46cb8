"""Terminal view of an inspection: summary, extreme tokens, checks, pairs with coloured tokens. Also as an SVG image."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tisdpo_cli.cli.prompt_view import prompt_view
from tisdpo_cli.cli.widths import print_whole, steady
from tisdpo_cli.text import glyphs, visible

if TYPE_CHECKING:
    from tisdpo_cli.engine.inspection.results import (
        Check,
        Comparison,
        Inspection,
        PairView,
        RankDifference,
        Token,
        TokenSummary,
    )

_SPARKS = "▁▂▃▄▅▆▇█"
# A curve that varies less than this is drawn flat: rounding has no shape.
_FLAT = 0.005
# Width in columns from which both responses of a pair fit next to each other.
_SIDE_BY_SIDE = 100
# Blue below the neutral value, orange above it; each with the text colour of the better contrast.
_BLUE = ("#deebf7", "#9ecae1", "#4292c6", "#08519c")
_ORANGE = ("#feedde", "#fdbe85", "#f16913", "#a63603")
_SIGNS = "⟦⟧ stop token; ⟨⟩ one character in several tokens; · space; ⏎ newline"


def render(inspection: Inspection, limit: int = 1) -> str:
    """Render the whole view as text for stdout, in colour if stdout is a terminal that supports it.

    Args:
        inspection: results to show.
        limit: maximum number of pairs to show.
    """
    console = steady(Console(highlight=False, markup=False, emoji=False))
    with console.capture() as captured:
        print_whole(console, _overview(inspection))
        console.print(pair_view(inspection, coloured=_coloured(console), width=console.width, limit=limit))
    return captured.get().rstrip("\n")


def picture(inspection: Inspection, stages: RenderableType | None = None, width: int = 120) -> str:
    """Render the view as a self-contained SVG image.

    Args:
        inspection: results to show.
        stages: table of a pipeline to show above them.
        width: columns of text.
    """
    console = Console(
        record=True,
        width=width,
        file=StringIO(),
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
        markup=False,
        emoji=False,
        no_color=False,
    )
    if stages is not None:
        console.print(stages)
    console.print(_overview(inspection))
    console.print(pair_view(inspection, coloured=True, width=width))
    return _without_web_fonts(console.export_svg(title="tisdpo inspect-weights"))


def _without_web_fonts(svg: str) -> str:
    """Remove the font downloads that rich puts into the style block; an image must not access the network."""
    style, end, body = svg.partition("</style>")
    return re.sub(r"@font-face \{.*?\}", "", style, flags=re.DOTALL) + end + body


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


# Overview ------------------------------------------------------------------------------------------------------


def _overview(inspection: Inspection) -> Group:
    parts: list[RenderableType] = [
        *_header(inspection),
        _summary(inspection),
        *_extremes(inspection),
        "",
        _checks(inspection.checks),
        "",
    ]
    if inspection.comparison is not None:
        parts += _comparison(inspection.comparison)
    return Group(*parts)


def _header(inspection: Inspection) -> list[Text]:
    provenance = inspection.provenance
    lines = [Text(f"{visible(inspection.source)} · {inspection.split} · {inspection.pairs} pairs", style="bold")]
    lines.append(Text(f"weights: {inspection.transform}"))
    models = provenance.get("models")
    inputs = {**(models if isinstance(models, dict) else {}), "dataset": provenance.get("dataset")}
    for name, entry in inputs.items():
        if isinstance(entry, dict):
            line = f"{name}: {entry.get('path')} ({str(entry.get('sha256'))[:12]})"
            lines.append(Text(visible(line), style="dim"))
    tokenizer, versions = str(provenance.get("tokenizer in use"))[:12], provenance.get("shown by", {})
    packages = ", ".join(f"{name} {versions.get(name)}" for name in ("tisdpo", "torch", "transformers"))
    lines.append(Text(f"tokenizer: {tokenizer}; {packages}", style="dim"))
    if provenance.get("command"):
        lines.append(Text(visible(f"command: {provenance['command']}"), style="dim"))
    return lines


def _summary(inspection: Inspection) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for side in inspection.sides:
        table.add_column(side, justify="right")
    for label, values in inspection.summary_rows():
        table.add_row(label, *values)
    # Most tokens are near neutral; square roots keep the others visible.
    counts = ([math.sqrt(count) for count in side] for side in inspection.scores.counts.values())
    edges = inspection.scores.edges
    name = "weights" if inspection.separation is None else "r"
    table.add_row(f"{name} from {edges[0]:+.2f} to {edges[-1]:+.2f}", *map(_spark, counts))
    table.add_row("mean by position", *map(_spark, inspection.curves[inspection.show].values()))
    if inspection.separation is not None:
        accuracy, auc = inspection.separation.accuracy, inspection.separation.auc
        table.add_row("pairs separated by Σr", f"{accuracy:.1%}", f"ROC area {auc:.3f}")
    return table


def _spark(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    span = high - low
    if span < _FLAT:
        return _SPARKS[3] * len(values)
    return "".join(_SPARKS[min(7, int(8 * (value - low) / span))] for value in values)


class _Flow:
    """A label and items on as many lines as needed, broken between items only."""

    def __init__(self, label: str, items: Sequence[Text]) -> None:
        self._label, self._items = label, items

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[Text]:
        line, gap = Text().append(f"{self._label}:", style="bold"), " "
        for item in self._items:
            if line.cell_len + len(gap) + item.cell_len > options.max_width:
                yield line
                line = item.copy()
            else:
                line.append(gap).append_text(item)
            gap = "  "
        yield line


def _extremes(inspection: Inspection) -> list[_Flow]:
    return [
        _Flow(f"{label} {inspection.ranked_by}", _token_items(tokens))
        for label, tokens in (("highest", inspection.highest), ("lowest", inspection.lowest))
    ]


def _token_items(tokens: Sequence[TokenSummary]) -> list[Text]:
    items = [Text(f"{glyphs(token.text)} {token.mean:+.2f} (×{token.count})") for token in tokens]
    return items or [Text("no frequent tokens")]


def _checks(checks: Sequence[Check]) -> _Flow:
    items = []
    for check in checks:
        value = "–" if check.value is None else f"{check.value:.3g}"
        bound = f"{'≥' if check.at_least else '≤'} {check.bound:g}"
        mark, style = ("✓", "") if check.passed else ("✗", "bold yellow")
        items.append(Text(f"{mark} {check.name} {value} ({bound})", style=style))
    return _Flow("checks", items)


def _comparison(comparison: Comparison) -> list[RenderableType]:
    names = f"{comparison.of} of {visible(comparison.first)}\ncompared with {visible(comparison.second)}"
    statistics = (
        f"agreement in direction {comparison.agreement:.1%}",
        f"rank correlation {comparison.rank_correlation:.3f}",
        f"within a response {comparison.within:.3f}",
        f"{comparison.tokens} tokens",
    )
    differing = [Text(_rank_difference(row)) for row in comparison.differing] or [Text("no frequent tokens")]
    return [
        Text(names, style="bold"),
        Text(", ".join(statistics)),
        _Flow("largest rank differences", differing),
        "",
    ]


def _rank_difference(row: RankDifference) -> str:
    ranks = f"{row.first_rank:.0%} → {row.second_rank:.0%}"
    return f"{glyphs(row.text)} {row.first:.2f} → {row.second:.2f} ({ranks}, ×{row.count})"


# Pairs, token by token -----------------------------------------------------------------------------------------


def pair_view(
    inspection: Inspection, coloured: bool | None = None, width: int | None = None, limit: int = 1
) -> RenderableType:
    """Pairs with every token coloured by its weight or score, chosen next to rejected if the width allows it.

    Args:
        inspection: results with the pairs.
        coloured: use colours, not numbers; default: whether stderr supports colours.
        width: in columns; default: that of stderr.
        limit: maximum number of pairs.
    """
    console = steady(Console(stderr=True))
    coloured = _coloured(console) if coloured is None else coloured
    width = width or console.width
    views = [_one_pair(inspection, view, coloured, width) for view in inspection.views[:limit]]
    return Group(*views, _legend(inspection, coloured))


def _one_pair(inspection: Inspection, pair: PairView, coloured: bool, width: int) -> RenderableType:
    # 4 columns for the border and padding of a panel.
    room = (width // 2 if width >= _SIDE_BY_SIDE else width) - 4
    panels = [
        Panel(_lines(tokens, inspection, coloured, room), title=name, title_align="left")
        for name, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    head = Text(f"pair {pair.index} ({visible(pair.where)})", style="bold")
    return Group(head, prompt_view(pair, width), _arrange(panels, width))


def _lines(tokens: Sequence[Token], inspection: Inspection, coloured: bool, room: int) -> Text:
    """Tokens in lines of at most `room` columns, broken between tokens: glyphs leave no white space to break at."""
    body, used = Text(overflow="fold"), 0
    for before, token in zip([None, *tokens], tokens, strict=False):
        piece = _token(token, inspection, coloured)
        if token.group is not None and (before is None or before.group != token.group):
            piece = Text(f"⟨{glyphs(token.character)} ", style="dim").append_text(piece)
        after = tokens[token.position + 1] if token.position + 1 < len(tokens) else None
        if token.group is not None and (after is None or after.group != token.group):
            piece = piece.append("⟩", style="dim")
        if used and used + piece.cell_len > room:
            body.append("\n")
            used = 0
        body.append_text(piece)
        used = 0 if token.text.endswith("\n") else used + piece.cell_len
        if token.text.endswith("\n"):
            body.append("\n")
    return body


def _arrange(panels: Sequence[Panel], width: int) -> RenderableType:
    if width < _SIDE_BY_SIDE:
        return Group(*panels)
    grid = Table.grid(expand=True)
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    return grid


def _token(token: Token, inspection: Inspection, coloured: bool) -> Text:
    shown = glyphs(token.text) if token.group is None else token.bytes
    shown = f"⟦{shown}⟧" if token.kind == "eos" else shown
    value = token.value(inspection.show)
    if not coloured:
        form = ".2f" if inspection.show == "weights" else "+.2f"
        return Text(shown + ("{–}" if value is None else f"{{{value:{form}}}}"))
    if value is None:
        return Text(shown, style="dim strike")
    return Text(shown, style=_style(inspection.scale.level(value), token.clipped))


def _style(level: int, clipped: bool) -> str:
    """Colour by the step on the scale; underlined above neutral as a second cue, italic if clipped."""
    extra = " italic" if clipped else ""
    if level == 0:
        return f"default{extra}"
    colour = (_ORANGE if level > 0 else _BLUE)[abs(level) - 1]
    text = "#000000" if abs(level) < 4 else "#ffffff"
    return f"{text} on {colour}{' underline' if level > 0 else ''}{extra}"


def _legend(inspection: Inspection, coloured: bool) -> Text:
    name = inspection.value_name
    if not coloured:
        return Text(f"token{{{name}}}, neutral {inspection.scale.neutral:g}; {_SIGNS}", style="dim")
    low, high = inspection.scale.ends
    text = Text(f"{name} {low:.2f} ", style="dim")
    for step in range(-4, 5):
        text.append("  ", style=_style(step, False).replace(" underline", ""))
    text.append(f" {high:.2f}", style="dim")
    return text.append(f"  underlined: above neutral; italic: clipped; {_SIGNS}", style="dim")
