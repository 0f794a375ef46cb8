"""The tokens of an inspection as a CSV file, for notebooks and spreadsheets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from io import StringIO
from typing import Any

from tisdpo_cli.engine.inspection.results import Inspection, Token


def table(inspection: Inspection) -> Iterator[str]:
    """Lines of the CSV file: a header, then one line per token of the shown pairs.

    Texts are JSON strings, which preserves every character and keeps spreadsheets from reading one as a formula.
    """
    yield _line(["pair", "side", *(field.name for field in fields(Token))])
    for view in inspection.views:
        for side, tokens in (("chosen", view.chosen), ("rejected", view.rejected)):
            for token in tokens:
                values = asdict(token)
                values |= {key: json.dumps(values[key]) for key in ("text", "character")}
                yield _line([view.index, side, *("" if value is None else value for value in values.values())])


def origin(inspection: Inspection) -> str:
    """Provenance of the table as JSON, for a file next to it: a CSV file has no place for metadata."""
    provenance = {"source": inspection.source, "split": inspection.split, **inspection.provenance}
    return json.dumps(provenance, indent=2, ensure_ascii=True) + "\n"


def _line(values: Sequence[Any]) -> str:
    line = StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
