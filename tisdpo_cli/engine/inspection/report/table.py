"""The tokens of an inspection as a CSV file, for a notebook or a spreadsheet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from io import StringIO
from typing import Any

from tisdpo_cli.engine.inspection.results import Inspection, Token


def table(inspection: Inspection) -> Iterator[str]:
    """The lines: a header, and one line for each token of the pairs that are shown.

    Texts are JSON strings: every character survives, and no spreadsheet takes one for a formula.
    """
    yield _line(["pair", "side", *(field.name for field in fields(Token))])
    for view in inspection.views:
        for side, tokens in (("chosen", view.chosen), ("rejected", view.rejected)):
            for token in tokens:
                values = asdict(token)
                values |= {key: json.dumps(values[key]) for key in ("text", "character")}
                yield _line([view.index, side, *("" if value is None else value for value in values.values())])


def origin(inspection: Inspection) -> str:
    """Where the values come from, as JSON: a CSV file has no place for that."""
    told = {"source": inspection.source, "split": inspection.split, **inspection.provenance}
    return json.dumps(told, indent=2, ensure_ascii=True) + "\n"


def _line(values: Sequence[Any]) -> str:
    line = StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
