"""The HTML report of an inspection: one self-contained file that works offline and is readable without scripts.

Texts of the data reach the page in two ways only: through jinja2 with autoescape, and as JSON in a block that browsers
do not execute, which the script of the page shows as text. A content security policy blocks everything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from tisdpo_cli.engine.inspection.report.charts import curves_chart, histogram_chart, roc_chart
from tisdpo_cli.engine.inspection.results import VALUE_NAMES, Inspection, PairView, ResponseFacts, Token
from tisdpo_cli.engine.offline_page import asset, source_hash, template_environment
from tisdpo_cli.text import glyphs, visible

_PACKAGE = "tisdpo_cli.engine.inspection.report"
# Pairs in the page without scripts; the script shows as many per page.
_STATIC_PAIRS = 10
# Longer tokens are shortened: nobody reads twenty thousand characters in one token.
_LONGEST_TOKEN = 200
_DIGITS = 4
# Lines of about this many characters from which a prompt is folded. A text is folded later: it may be one question.
_LINE, _FOLDED_TURNS, _FOLDED_TEXT = 110, 6, 30
# Characters of a folded prompt that stay visible.
_VISIBLE = 240


def page(inspection: Inspection, stages: Sequence[Mapping[str, str]] = ()) -> str:
    """Render the report.

    Args:
        inspection: results, with the pairs to show.
        stages: of a pipeline, column to text, for a table at the top.
    """
    style, script = asset(_PACKAGE, "page.css"), asset(_PACKAGE, "page.js")
    policy = (
        f"default-src 'none'; script-src '{source_hash(script)}'; style-src '{source_hash(style)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    return (
        _environment()
        .get_template("page.html")
        .render(
            inspection=inspection,
            stages=stages,
            policy=policy,
            style=Markup(style),
            script=Markup(script),
            data=Markup(_json(_data(inspection))),
            static_views=inspection.views[:_STATIC_PAIRS],
            charts=_charts(inspection),
            provenance=list(_flat(inspection.provenance)),
        )
    )


@cache
def _environment() -> Environment:
    environment = template_environment(_PACKAGE)
    environment.filters |= {
        "visible": visible,
        "lines": _lines,
        "glyphs": _token_text,
        "percent": lambda share: f"{share:.1%}",
    }
    environment.globals |= {
        "prompt_of": _prompt,
        "runs": _runs,
        "level": _level,
        "side_text": _side_text,
        "value_text": _value_text,
        "isnone": lambda value: value is None,
    }
    return environment


def _json(value: Any) -> str:
    """JSON that cannot end a script block and has no line end that only JavaScript knows."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _lines(text: str) -> str:
    return visible(text.strip(), keep_lines=True)


def _token_text(text: str) -> str:
    shown = glyphs(text)
    return shown if len(shown) <= _LONGEST_TOKEN else f"{shown[:_LONGEST_TOKEN]}…(+{len(shown) - _LONGEST_TOKEN})"


def _charts(inspection: Inspection) -> list[tuple[str, str, Markup]]:
    """(title, caption, SVG) of each chart."""
    value = "weight" if inspection.separation is None else "score r"
    charts = [
        (
            f"Distribution of {value}",
            "share of the tokens of each side (square-root scale); the first and last bins include all values beyond",
            histogram_chart(inspection.scores, f"histogram of {value} of chosen and rejected tokens"),
        )
    ]
    for show, sides in inspection.curves.items():
        name = VALUE_NAMES[show]
        charts.append(
            (
                f"Mean {name} by position",
                "from the first to the last token of a response; dotted: neutral",
                curves_chart(sides, f"mean {name} by relative position", inspection.scales[show].neutral),
            )
        )
    charts.append(
        (
            "Effective sample size",
            "(Σw)² / (n Σw²) of a response, share of responses (square-root scale); 100 %: all weights equal",
            histogram_chart(inspection.sizes, "histogram of effective sample sizes", ".0%"),
        )
    )
    if inspection.separation is not None:
        charts.append(
            (
                "Separation of chosen and rejected by Σr",
                f"ROC curve over all responses, area {inspection.separation.auc:.3f}; "
                f"accuracy {inspection.separation.accuracy:.1%} over pairs",
                roc_chart(inspection.separation.roc, "ROC curve of the sum of r"),
            )
        )
    return charts


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text)."""
    rows = []
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            rows += _flat(inner, f"{prefix}{name}.")
        elif inner is not None:
            rows.append((f"{prefix}{name}", visible(str(inner))))
    return rows


# Pairs ---------------------------------------------------------------------------------------------------------


def _prompt(view: PairView) -> dict[str, Any]:
    """The prompt of a pair, for the page and its script.

    Keys: t turns as (role, text), without a role for a row of texts; h what stays visible if the prompt is folded, as
    (what is folded, role, text), or None.
    """
    if not view.turns:
        text = _lines(view.prompt)
        count = len(text)
        # The question is at the end of a text.
        head = (f"prompt of {count} characters", "", "…" + text[-_VISIBLE:]) if _height(text) > _FOLDED_TEXT else None
        return {"h": head, "t": [("", text)]}
    turns = [(turn.role, _lines(turn.text)) for turn in view.turns]
    if sum(_height(text) for _, text in turns) <= _FOLDED_TURNS:
        return {"h": None, "t": turns}
    role, text = next((turn for turn in reversed(turns) if turn[0] == "user"), turns[-1])
    shown = text if len(text) <= _VISIBLE else text[:_VISIBLE] + "…"
    return {"h": (f"prompt of {len(turns)} turn{'s' * (len(turns) > 1)}", role, shown), "t": turns}


def _height(text: str) -> int:
    """Number of lines that a text takes, about."""
    return sum(1 + len(line) // _LINE for line in text.split("\n"))


def _level(inspection: Inspection, token: Token) -> int | None:
    """Colour step of a token in the page without scripts, by the value that the inspection shows."""
    value = token.value(inspection.show)
    return None if value is None else inspection.scale.level(value)


def _runs(tokens: Sequence[Token]) -> list[tuple[str, list[Token]]]:
    """Runs of tokens: (text, tokens) for a split character, ("", [token]) for each other token."""
    runs: list[tuple[str, list[Token]]] = []
    for token in tokens:
        last = runs[-1][1][-1] if runs else None
        if token.group is not None and last is not None and last.group == token.group:
            runs[-1][1].append(token)
        else:
            runs.append((glyphs(token.character) if token.group is not None else "", [token]))
    return runs


def _data(inspection: Inspection) -> dict[str, Any]:
    """Input of the script: every distinct token text once, and numbers as integers of 1/10000."""
    values = [show for show in VALUE_NAMES if show in inspection.scales]
    named = {show: VALUE_NAMES[show] for show in values} | {name: f"weight by {name}" for name in inspection.previews}
    formulas = inspection.formulas
    modes = [
        {"name": shown, "formula": formulas.get(name), **_scale(inspection, name)} for name, shown in named.items()
    ]
    scored = [show for show in ("adjusted", "scores") if show in values]
    vocabulary: dict[tuple[int, str, str, str], int] = {}
    pairs = [_pair(inspection, view, values, vocabulary) for view in inspection.views]
    return {
        "modes": modes,
        "mode": values.index(inspection.show),
        # Which values the transform was given, and what became of the stop.
        "input": values.index(scored[0]) if scored else None,
        "eos": inspection.eos_weight,
        "page": _STATIC_PAIRS,
        "vocab": [[token_id, text, part, kind] for token_id, text, part, kind in vocabulary],
        "pairs": pairs,
    }


def _scale(inspection: Inspection, name: str) -> dict[str, Any]:
    scale = inspection.scales[name]
    return {"neutral": scale.neutral, "width": scale.width, "log": scale.logarithmic, "ends": list(scale.ends)}


def _pair(
    inspection: Inspection, view: PairView, values: Sequence[str], vocabulary: dict[tuple[int, str, str, str], int]
) -> dict[str, Any]:
    """One pair for the script.

    Keys: i index, w where, p prompt (see `_prompt`), s sides; of a side t tokens, m values by mode, f flags,
    u unclipped weights, g groups, l log-probs, s statistics, h the same as text.
    """
    sides = []
    for name, tokens in (("chosen", view.chosen), ("rejected", view.rejected)):
        columns = [[token.value(show) for token in tokens] for show in values]
        columns += [view.previews[other][name] for other in inspection.previews]
        facts = view.sides[name]
        sides.append(
            {
                "t": [_word(token, vocabulary) for token in tokens],
                "m": [[_integer(value) for value in column] for column in columns],
                "f": [token.clipped + 2 * token.masked + 4 * token.truncated for token in tokens],
                "u": {str(t.position): _integer(t.unclipped) for t in tokens if t.clipped},
                "g": [[run[0].position, run[-1].position + 1, text] for text, run in _runs(tokens) if text and run],
                "l": _logps(tokens),
                "h": _side_text(facts),
                "s": [
                    _integer(facts.total_score),
                    _integer(facts.mean_weight),
                    _integer(facts.share_clipped),
                    _integer(facts.effective_sample_size),
                ],
            }
        )
    return {"i": view.index, "w": visible(view.where), "p": _prompt(view), "s": sides}


def _side_text(facts: ResponseFacts) -> str:
    """A response as a whole, in words."""
    total = "" if facts.total_score is None else f"Σr {facts.total_score:+.2f}, ".replace("-", "−")
    return (
        f"{total}mean weight {facts.mean_weight:.3f}, clipped {facts.share_clipped:.1%}, "
        f"effective size {facts.effective_sample_size:.1%}"
    )


def _value_text(inspection: Inspection, token: Token) -> str:
    """The value of a token as the script writes it."""
    rounded = _integer(token.value(inspection.show))
    if rounded is None:
        return "no score (truncated)"
    form = ".4f" if inspection.scale.neutral else "+.4f"
    return f"{rounded / 10**_DIGITS:{form}}".replace("-", "−")


def _logps(tokens: Sequence[Token]) -> list[list[int | None]] | None:
    if all(token.logp_forward is None for token in tokens):
        return None
    return [[_integer(token.logp_forward) for token in tokens], [_integer(token.logp_reverse) for token in tokens]]


def _word(token: Token, vocabulary: dict[tuple[int, str, str, str], int]) -> int:
    key = (token.id, _token_text(token.text), token.bytes[: 2 * _LONGEST_TOKEN], token.kind)
    return vocabulary.setdefault(key, len(vocabulary))


def _integer(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else round(value * 10**_DIGITS)
