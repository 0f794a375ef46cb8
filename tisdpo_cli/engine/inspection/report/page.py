"""The report of an inspection: one HTML file that stands alone, offline, readable without scripts.

Texts of the data reach the page in two ways only: through jinja2 with autoescape, and as JSON in a block that no
browser runs, which the page's script reads and shows as text. A content security policy lets nothing else run or load.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tisdpo_cli.engine.inspection.report import pictures
from tisdpo_cli.engine.inspection.results import Inspection, PairView, Token
from tisdpo_cli.text import glyphs, visible

# Pairs that are there without scripts; the script shows as many on a page.
_STATIC = 10
# A token longer than this is shown cut; nobody reads twenty thousand characters in one token.
_LONGEST = 200
_DIGITS = 4
_SHOWN = {"weights": "weight", "scores": "score r", "adjusted": "r after the steps"}


def page(inspection: Inspection, stages: Sequence[Mapping[str, str]] = ()) -> str:
    """The page.

    Args:
        inspection: the facts, with the pairs that are to be on it.
        stages: of a pipeline, by column, to come first; none for an inspection alone.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; "
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
            first=inspection.views[:_STATIC],
            shown=_SHOWN,
            previews=inspection.previews,
            pictures=_pictures(inspection),
            provenance=list(_flat(inspection.provenance)),
        )
    )


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("tisdpo_cli.engine.inspection.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"visible": visible, "lines": _lines, "glyphs": _shown_text, "percent": lambda x: f"{x:.1%}"}
    made.globals |= {"pieces": _pieces, "level": _level, "isnone": lambda x: x is None}
    return made


def _asset(name: str) -> str:
    return files("tisdpo_cli.engine.inspection.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that ends no script block, and holds no line end that JavaScript knows and JSON does not."""
    made = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return made.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _lines(text: str) -> str:
    return visible(text.strip(), keep_lines=True)


def _shown_text(text: str) -> str:
    shown = glyphs(text)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…(+{len(shown) - _LONGEST})"


def _pictures(inspection: Inspection) -> list[tuple[str, str, Markup]]:
    """Title, caption and picture."""
    final = inspection.separation is None
    what, many = ("weight", "weights") if final else ("score r", "scores r")
    made = [
        (
            f"How the {many} are spread",
            "share of the tokens of each side (square-root scale); the ends hold what lies beyond",
            pictures.histogram(inspection.scores, f"histogram of the {what} of chosen and rejected tokens"),
        )
    ]
    for show, sides in inspection.curves.items():
        name = _SHOWN[show]
        made.append(
            (
                f"Mean {name} by position",
                "from the first to the last token of a response; dotted: neutral",
                pictures.curves(sides, f"mean {name} by relative position", inspection.scales[show].neutral),
            )
        )
    made.append(
        (
            "Effective sample size",
            "(Σw)² / (n Σw²) of a response, share of responses (square-root scale); 100 %: all weights equal",
            pictures.histogram(inspection.sizes, "histogram of effective sample sizes", ".0%"),
        )
    )
    if inspection.separation is not None:
        made.append(
            (
                "Does Σr separate chosen from rejected?",
                f"ROC over all responses, area {inspection.separation.auc:.3f}; "
                f"right in {inspection.separation.accuracy:.1%} of the pairs",
                pictures.roc(inspection.separation.roc, "ROC curve of the sum of r"),
            )
        )
    return made


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text)."""
    found = []
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            found += _flat(inner, f"{prefix}{name}.")
        elif inner is not None:
            found.append((f"{prefix}{name}", visible(str(inner))))
    return found


# Pairs ---------------------------------------------------------------------------------------------------------


def _level(inspection: Inspection, token: Token) -> int | None:
    """The colour of a token without scripts: by the value that the inspection shows."""
    value = {"weights": token.weight, "scores": token.score, "adjusted": token.adjusted}[inspection.show]
    return None if value is None else inspection.scale.level(value)


def _pieces(tokens: Sequence[Token]) -> list[tuple[str, list[Token]]]:
    """Tokens in runs: (text, tokens) of a split character, and ("", [token]) of each other one."""
    runs: list[tuple[str, list[Token]]] = []
    for token in tokens:
        last = runs[-1][1][-1] if runs else None
        if token.group is not None and last is not None and last.group == token.group:
            runs[-1][1].append(token)
        else:
            runs.append((glyphs(token.character) if token.group is not None else "", [token]))
    return runs


def _data(inspection: Inspection) -> dict[str, Any]:
    """What the script shows: every token text once, and numbers as integers of 1/10000."""
    own = [show for show in _SHOWN if show in inspection.scales]
    modes = [{"name": _SHOWN[show], **_scale(inspection, show)} for show in own]
    modes += [{"name": f"weight by {name}", **_scale(inspection, name)} for name in inspection.previews]
    vocabulary: dict[tuple[int, str, str, str], int] = {}
    pairs = [_pair(inspection, view, own, vocabulary) for view in inspection.views]
    return {
        "modes": modes,
        "mode": own.index(inspection.show),
        "steps": "adjusted" in own,
        "page": _STATIC,
        "vocab": [[at, text, part, kind] for at, text, part, kind in vocabulary],
        "pairs": pairs,
    }


def _scale(inspection: Inspection, name: str) -> dict[str, Any]:
    of = inspection.scales[name]
    return {"neutral": of.neutral, "width": of.width, "log": of.logarithmic, "ends": list(of.ends)}


def _pair(
    inspection: Inspection, view: PairView, own: Sequence[str], vocabulary: dict[tuple[int, str, str, str], int]
) -> dict[str, Any]:
    sides = []
    for name, tokens in (("chosen", view.chosen), ("rejected", view.rejected)):
        values = {
            "weights": [token.weight for token in tokens],
            "scores": [token.score for token in tokens],
            "adjusted": [token.adjusted for token in tokens],
        }
        columns = [values[show] for show in own] + [view.previews[other][name] for other in inspection.previews]
        facts = view.sides[name]
        sides.append(
            {
                "t": [_word(token, vocabulary) for token in tokens],
                "m": [[_whole(value) for value in column] for column in columns],
                "f": [token.clipped + 2 * token.masked + 4 * token.truncated for token in tokens],
                "u": {str(t.position): _whole(t.unclipped) for t in tokens if t.clipped},
                "g": [[run[0].position, run[-1].position + 1, text] for text, run in _pieces(tokens) if text and run],
                "l": [
                    [_whole(getattr(token, column)) for token in tokens] for column in ("logp_forward", "logp_reverse")
                ]
                if any(token.logp_forward is not None for token in tokens)
                else None,
                "s": [
                    _whole(facts.total_score),
                    _whole(facts.mean_weight),
                    _whole(facts.share_clipped),
                    _whole(facts.effective_sample_size),
                ],
            }
        )
    return {"i": view.index, "w": visible(view.where), "p": _lines(view.prompt), "s": sides}


def _word(token: Token, vocabulary: dict[tuple[int, str, str, str], int]) -> int:
    key = (token.id, _shown_text(token.text), token.bytes[: 2 * _LONGEST], token.kind)
    return vocabulary.setdefault(key, len(vocabulary))


def _whole(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else round(value * 10**_DIGITS)
