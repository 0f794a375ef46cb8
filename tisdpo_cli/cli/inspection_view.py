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

from tisdpo_cli.text import glyphs, visible

if TYPE_CHECKING:
    from tisdpo_cli.engine.inspection.results import Comparison, Inspection, PairView, Token, TokenSummary
    from tisdpo_cli.engine.pipeline import PipelineResult

_SPARKS = "▁▂▃▄▅▆▇█"
# A curve that varies less than this is drawn flat: rounding is no shape.
_FLAT = 0.005
_SIDE_BY_SIDE = 100
# Blue below the neutral point, orange above it; each with the text colour of the better contrast.
_BLUE = ("#deebf7", "#9ecae1", "#4292c6", "#08519c")
_ORANGE = ("#feedde", "#fdbe85", "#f16913", "#a63603")


def render(inspection: Inspection, limit: int = 1) -> str:
    """The whole view as text for stdout, in colour where stdout is a terminal that shows it.

    Args:
        inspection: the facts.
        limit: pairs to show, of those that it holds.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(_overview(inspection))
        console.print(pair_view(inspection, coloured=_coloured(console), width=console.width, limit=limit))
    return captured.get().rstrip("\n")


def _overview(inspection: Inspection) -> Group:
    parts = [*_header(inspection), _summary(inspection), _extremes(inspection), _checks(inspection)]
    return Group(*parts, *([_compared(inspection.comparison)] if inspection.comparison is not None else []))


def picture(inspection: Inspection, made: PipelineResult | None = None, width: int = 120) -> str:
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
    console.print(_overview(inspection))
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
    dataset, versions = inspection.provenance.get("dataset"), inspection.provenance.get("shown by", {})
    if isinstance(dataset, dict):
        told = f"dataset: {dataset.get('path')} ({str(dataset.get('sha256'))[:12]})"
        lines.append(Text(visible(told), style="dim"))
    tokenizer = str(inspection.provenance.get("tokenizer in use"))[:12]
    told = ", ".join(f"{name} {versions.get(name)}" for name in ("tisdpo", "torch", "transformers"))
    lines.append(Text(f"tokenizer: {tokenizer}; {told}", style="dim"))
    if inspection.provenance.get("command"):
        lines.append(Text(visible(f"command: {inspection.provenance['command']}"), style="dim"))
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
    table.add_column("", no_wrap=True)
    for side in inspection.sides:
        table.add_column(side, justify="right")
    for label, key, form in _ROWS:
        values = [getattr(side, key) for side in inspection.sides.values()]
        if None not in values:
            table.add_row(label, *map(form.format, values))
    final = inspection.separation is None
    # Most tokens are near neutral: by square roots the others can be seen beside them.
    counts = ([math.sqrt(count) for count in side] for side in inspection.scores.counts.values())
    edges = inspection.scores.edges
    name = "weights" if final else "r"
    table.add_row(f"{name} from {edges[0]:+.2f} to {edges[-1]:+.2f}", *map(_spark, counts))
    table.add_row("by position", *(_spark(curve) for curve in inspection.curves[inspection.show].values()))
    if inspection.separation is not None:
        told = f"{inspection.separation.accuracy:.1%}"
        table.add_row("Σr separates the pair", told, f"ROC area {inspection.separation.auc:.3f}")
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


def _checks(inspection: Inspection) -> Text:
    text = Text("checks: ", style="bold")
    for check in inspection.checks:
        value = "–" if check.value is None else f"{check.value:.3g}"
        bound = f"{'≥' if check.at_least else '≤'} {check.bound:g}"
        mark, style = ("✓", "default not bold") if check.passed else ("✗", "bold yellow")
        text.append(f"{mark} {check.name} {value} ({bound})  ", style=style)
    return text.append("\n")


def _compared(two: Comparison) -> Text:
    text = Text(f"{two.of} of {visible(two.first)}\ncompared with {visible(two.second)}: ", style="bold")
    text.append(
        f"agreement in direction {two.agreement:.1%}, rank correlation {two.rank_correlation:.3f} (within a response "
        f"{two.within:.3f}), {two.tokens} tokens\n",
        style="default not bold",
    )
    text.append("ranked most differently: ", style="bold")
    shown = (
        f"{glyphs(row.text)} {row.first:.2f} → {row.second:.2f} ({row.first_rank:.0%} → {row.second_rank:.0%}, "
        f"×{row.count})"
        for row in two.differing
    )
    return text.append("  ".join(shown) or "none frequent enough", style="default not bold").append("\n")


def pair_view(
    inspection: Inspection, coloured: bool | None = None, width: int | None = None, limit: int = 1
) -> RenderableType:
    """Pairs, chosen beside rejected, every token coloured by its weight or score."""
    console = Console(stderr=True)
    coloured = _coloured(console) if coloured is None else coloured
    width = width or console.width
    views = [_one_pair(inspection, view, coloured, width) for view in inspection.views[:limit]]
    return Group(*views, _legend(inspection, coloured))


def _one_pair(inspection: Inspection, pair: PairView, coloured: bool, width: int) -> RenderableType:
    panels = []
    for name, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        room = (width // 2 if width >= _SIDE_BY_SIDE else width) - 4
        panels.append(Panel(_lines(tokens, inspection, coloured, room), title=name, title_align="left"))
    prompt = Text(visible(pair.prompt.strip(), keep_lines=True), style="dim")
    head = Text(f"pair {pair.index} ({visible(pair.where)})", style="bold")
    return Group(head, prompt, _arrange(panels, width))


def _lines(tokens: Sequence[Token], inspection: Inspection, coloured: bool, room: int) -> Text:
    """Tokens one after the other, broken between tokens: there is no white space left to break at."""
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


def _value(token: Token, inspection: Inspection) -> float | None:
    return {"weights": token.weight, "scores": token.score, "adjusted": token.adjusted}[inspection.show]


def _token(token: Token, inspection: Inspection, coloured: bool) -> Text:
    shown = glyphs(token.text) if token.group is None else token.bytes
    shown = f"⟦{shown}⟧" if token.kind == "eos" else shown
    value = _value(token, inspection)
    if not coloured:
        form = ".2f" if inspection.show == "weights" else "+.2f"
        return Text(shown + ("{–}" if value is None else f"{{{value:{form}}}}"))
    if value is None:
        return Text(shown, style="dim strike")
    return Text(shown, style=_style(inspection.scale.level(value), token.clipped))


def _style(level: int, clipped: bool) -> str:
    """Colour by the step on the scale, underline as a second cue for tokens that count more, italics where clipped."""
    extra = " italic" if clipped else ""
    if level == 0:
        return f"default{extra}"
    colour = (_ORANGE if level > 0 else _BLUE)[abs(level) - 1]
    text = "#000000" if abs(level) < 4 else "#ffffff"
    return f"{text} on {colour}{' underline' if level > 0 else ''}{extra}"


def _legend(inspection: Inspection, coloured: bool) -> Text:
    what = {"weights": "weight", "scores": "score r", "adjusted": "r after the steps"}[inspection.show]
    signs = "⟦⟧ end of sequence; ⟨⟩ one character in several tokens; · space; ⏎ newline"
    if not coloured:
        return Text(f"token{{{what}}}, neutral {inspection.scale.neutral:g}; {signs}", style="dim")
    low, high = inspection.scale.ends
    text = Text(f"{what} {low:.2f} ", style="dim")
    for step in range(-4, 5):
        text.append("  ", style=_style(step, False).replace(" underline", ""))
    text.append(f" {high:.2f}", style="dim")
    return text.append(f"  underlined: above neutral; italic: clipped; {signs}", style="dim")


def stage_table(made: PipelineResult) -> Table:
    """The stages of a pipeline with their main figures, before and after."""
    table, rows = Table(title_justify="left"), stage_rows(made)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("stage", "output") else "right", no_wrap=name == "stage")
    for row in rows:
        table.add_row(*row.values())
    return table


def stage_rows(made: PipelineResult) -> list[dict[str, str]]:
    """The same as text by column."""
    rows = []
    for name, stage in made.stages.items():
        metrics = stage.record.get("final_metrics", {})
        seconds = f"{stage.record.get('seconds', 0):.0f} s" if stage.fresh else "was there"
        figures = {label: _figure(metrics, key, form) for label, key, form in _STAGE_FIGURES}
        rows.append({"stage": name.replace("_", "-"), "output": visible(stage.path.name), "time": seconds} | figures)
    return rows


_STAGE_FIGURES = (
    ("loss", "loss", ".4f"),
    ("held-out loss", "eval/loss", ".4f"),
    ("held-out accuracy", "eval/rewards/accuracies", ".1%"),
    ("held-out margin", "eval/rewards/margins", "+.4f"),
)


def _figure(metrics: dict[str, Any], key: str, form: str) -> str:
    return format(metrics[key], form) if key in metrics else "–"
