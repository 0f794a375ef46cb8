"""How an inspection looks on a terminal: summary, coloured tokens, the table of a pipeline."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tisdpo_cli.cli.text import glyphs, visible

if TYPE_CHECKING:
    from tisdpo_cli.engine.facts import Inspection, Token, TokenSummary
    from tisdpo_cli.engine.pipeline import PipelineMade

_SPARKS = "▁▂▃▄▅▆▇█"
# A curve that varies less than this is drawn flat: rounding is no shape.
_FLAT = 0.005
_SIDE_BY_SIDE = 100
# Blue below the neutral point, orange above it; each with the text colour of the better contrast.
_BLUE = ("#deebf7", "#9ecae1", "#4292c6", "#08519c")
_ORANGE = ("#feedde", "#fdbe85", "#f16913", "#a63603")


def render(inspection: Inspection) -> str:
    """The whole view as text for stdout, in colour where stdout is a terminal that shows it."""
    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(Group(*_header(inspection), _summary(inspection), _extremes(inspection)))
        console.print(pair_view(inspection, coloured=_coloured(console), width=console.width))
    return captured.get().rstrip("\n")


def picture(inspection: Inspection, made: PipelineMade | None = None, width: int = 120) -> str:
    """The same view as an SVG image that stands alone: for a README, a talk, a colleague.

    Args:
        inspection: the facts.
        made: the stages of a pipeline, whose table comes first where given.
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
    if made is not None:
        console.print(stage_table(made))
    console.print(Group(*_header(inspection), _summary(inspection), _extremes(inspection)))
    console.print(pair_view(inspection, coloured=True, width=width))
    # The template names web fonts; a picture must not ask the network for anything.
    template = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="tisdpo inspect-weights", code_format=template)


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _header(inspection: Inspection) -> list[RenderableType]:
    models = inspection.provenance.get("models")
    lines = [Text(f"{visible(inspection.source)} · {inspection.split} · {inspection.pairs} pairs", style="bold")]
    lines.append(Text(f"weights: {inspection.transform}"))
    for name, entry in models.items() if isinstance(models, dict) else ():
        if isinstance(entry, dict):
            told = f"{name}: {entry.get('path')} ({str(entry.get('sha256'))[:12]})"
            lines.append(Text(visible(told), style="dim"))
    return list(lines)


_ROWS = (
    ("tokens", "tokens", "{:d}"),
    ("of them not scored", "unscored", "{:d}"),
    ("mean score r", "mean_score", "{:+.4f}"),
    ("spread of r", "sd_score", "{:.4f}"),
    ("mean r after the steps", "mean_adjusted", "{:+.4f}"),
    ("spread of r after the steps", "sd_adjusted", "{:.4f}"),
    ("mean weight", "mean_weight", "{:.4f}"),
    ("spread of weights", "sd_weight", "{:.4f}"),
    ("lowest weight", "min_weight", "{:.4f}"),
    ("highest weight", "max_weight", "{:.4f}"),
    ("share clipped", "share_clipped", "{:.1%}"),
    ("effective sample size", "effective_sample_size", "{:.1%}"),
)


def _summary(inspection: Inspection) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for side in inspection.sides:
        table.add_column(side, justify="right")
    for label, key, form in _ROWS:
        values = [getattr(side, key) for side in inspection.sides.values()]
        if None not in values:
            table.add_row(label, *map(form.format, values))
    table.add_row("by position", *(_spark(curve) for curve in inspection.curves.values()))
    if inspection.separation is not None:
        table.add_row("Σr separates the pair", f"{inspection.separation:.1%}", "")
    return table


def _spark(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    span = high - low
    if span < _FLAT:
        return _SPARKS[3] * len(values)
    return "".join(_SPARKS[min(7, int(8 * (value - low) / span))] for value in values)


def _extremes(inspection: Inspection) -> Text:
    text = Text()
    for label, tokens in (("highest", inspection.highest), ("lowest", inspection.lowest)):
        text.append(f"{label} {inspection.ranked_by}: ", style="bold").append(_list(tokens)).append("\n")
    return text


def _list(tokens: Sequence[TokenSummary]) -> str:
    return "  ".join(f"{glyphs(t.text)} {t.mean:+.2f} (×{t.count})" for t in tokens) or "none frequent enough"


def pair_view(inspection: Inspection, coloured: bool | None = None, width: int | None = None) -> RenderableType:
    """One pair, chosen beside rejected, every token coloured by its weight or score."""
    console = Console(stderr=True)
    coloured = _coloured(console) if coloured is None else coloured
    width = width or console.width
    pair = inspection.pair
    panels = []
    for name, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        room = (width // 2 if width >= _SIDE_BY_SIDE else width) - 4
        panels.append(Panel(_lines(tokens, inspection, coloured, room), title=name, title_align="left"))
    prompt = Text(visible(pair.prompt.strip(), keep_lines=True), style="dim")
    head = Text(f"pair {pair.index} ({visible(pair.where)})", style="bold")
    return Group(head, prompt, _arrange(panels, width), _legend(inspection, coloured))


def _lines(tokens: Sequence[Token], inspection: Inspection, coloured: bool, room: int) -> Text:
    """Tokens one after the other, broken between tokens: there is no white space left to break at."""
    body, used = Text(overflow="fold"), 0
    for token in tokens:
        piece = _token(token, inspection, coloured)
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


def _value(token: Token, inspection: Inspection) -> float | None:
    return {"weights": token.weight, "scores": token.score, "adjusted": token.adjusted}[inspection.show]


def _neutral(inspection: Inspection) -> float:
    return 1.0 if inspection.show == "weights" else 0.0


def _position(value: float, inspection: Inspection) -> float:
    """Where a value lies on the colour scale of the file: −1 to 1, 0 is neutral (weight 1, score 0)."""
    distance = value - _neutral(inspection)
    if inspection.logarithmic:
        distance = math.log(max(value, 1e-9))
    return max(-1.0, min(1.0, distance / inspection.scale))


def _token(token: Token, inspection: Inspection, coloured: bool) -> Text:
    shown = glyphs(token.text) if token.kind != "eos" else f"⟦{glyphs(token.text)}⟧"
    value = _value(token, inspection)
    if not coloured:
        form = ".2f" if inspection.show == "weights" else "+.2f"
        return Text(shown + ("{–}" if value is None else f"{{{value:{form}}}}"))
    if value is None:
        return Text(shown, style="dim strike")
    return Text(shown, style=_style(_position(value, inspection), token.clipped))


def _style(position: float, clipped: bool) -> str:
    """Colour by the size, underline as a second cue for tokens that count more, italics where clipped."""
    level = int(abs(position) * 4.999)
    extra = " italic" if clipped else ""
    if level == 0:
        return f"default{extra}"
    colour = (_ORANGE if position > 0 else _BLUE)[level - 1]
    text = "#000000" if level < 4 else "#ffffff"
    return f"{text} on {colour}{' underline' if position > 0 else ''}{extra}"


def _legend(inspection: Inspection, coloured: bool) -> Text:
    what = {"weights": "weight", "scores": "score r", "adjusted": "r after the steps"}[inspection.show]
    neutral = _neutral(inspection)
    if not coloured:
        return Text(f"token{{{what}}}, neutral {neutral:g}; ⟦⟧ end of sequence; · space; ⏎ newline", style="dim")
    low, high = neutral - inspection.scale, neutral + inspection.scale
    if inspection.logarithmic:
        low, high = math.exp(-inspection.scale), math.exp(inspection.scale)
    text = Text(f"{what} {low:.2f} ", style="dim")
    for step in range(-4, 5):
        text.append("  ", style=_style(step / 4, False).replace(" underline", ""))
    text.append(f" {high:.2f}", style="dim")
    return text.append("  underlined: above neutral; italic: clipped; · space; ⏎ newline", style="dim")


def stage_table(made: PipelineMade) -> Table:
    """The stages of a pipeline with their main figures, before and after."""
    table = Table(title_justify="left")
    for name in ("stage", "output", "time", "loss", "held-out loss", "held-out accuracy", "held-out margin"):
        table.add_column(name, justify="left" if name in ("stage", "output") else "right", no_wrap=name == "stage")
    for name, stage in made.stages.items():
        metrics = stage.record.get("final_metrics", {})
        seconds = f"{stage.record.get('seconds', 0):.0f} s" if stage.fresh else "was there"
        keys = (
            ("loss", ".4f"),
            ("eval/loss", ".4f"),
            ("eval/rewards/accuracies", ".1%"),
            ("eval/rewards/margins", "+.4f"),
        )
        figures = [_figure(metrics, key, form) for key, form in keys]
        table.add_row(name.replace("_", "-"), visible(stage.path.name), seconds, *figures)
    return table


def _figure(metrics: dict[str, Any], key: str, form: str) -> str:
    return format(metrics[key], form) if key in metrics else "–"
