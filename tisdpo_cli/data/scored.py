"""The scored dataset: the one place that knows the columns and the sign of its files.

A file holds `−r_t = log π⁻ − log π⁺` in both columns, for every token of the uncut response without its EOS (null
where it was not scored), and the EOS scores in columns of their own. Everything else speaks of r_t. A file of final
weights has the same columns, and in them the weights as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tisdpo_cli.data.reader import BadRow, Row
from tisdpo_cli.errors import DataError, UsageFault
from tisdpo_cli.files import sha256

MANIFEST = "estimate.json"
SIDES = ("chosen", "rejected")
# What is not below this is infinite in float32.
_FLOAT32_END = 2.0**128 - 2.0**103


@dataclass(frozen=True)
class Scores:
    """Scores r of one response in nats: of its tokens (None where not scored), and of its EOS where there is one.

    Of a file of final weights, the weights.
    """

    tokens: list[float | None]
    eos: float | None

    @property
    def known(self) -> list[float]:
        """Of the tokens that have one."""
        return [r for r in self.tokens if r is not None]


def read_scores(row: Row, side: str, tokens: int, shown: str, final: bool = False) -> Scores | BadRow:
    """The scores of one side of a row, checked against the number of tokens of its response.

    Args:
        row: the row as read.
        side: `chosen` or `rejected`.
        tokens: tokens of the uncut response under the tokenizer in use, the EOS not counted.
        shown: what to call the tokenizer in a message.
        final: whether the file holds weights.
    """
    column = f"{side}_weight"
    if column not in row.columns:
        return BadRow(row.where, f"no column {column!r}: {_NOTHING_THERE[final]}")
    values = row.columns[column]
    if not isinstance(values, list):
        return BadRow(row.where, f"{column!r} must be a list of numbers")
    for position, value in enumerate(values):
        if value is not None and not _is_number(value):
            return BadRow(
                row.where, f"{column!r} holds {json.dumps(value)[:20]} at position {position}; a number is needed"
            )
    if len(values) != tokens:
        return BadRow(row.where, f"{column!r} has {len(values)} values, but the response has {tokens} tokens ({shown})")
    eos = row.columns.get(f"{side}_eos_weight")
    if eos is not None and not _is_number(eos):
        return BadRow(row.where, f"'{side}_eos_weight' must be a number")
    sign = 1.0 if final else -1.0
    return Scores([None if v is None else sign * v for v in values], None if eos is None else sign * eos)


_NOTHING_THERE = {
    False: "this dataset is not scored; make it with `tisdpo estimate`",
    True: "there are no final weights; they are one number per response token, the end of the sequence left out",
}


def require_scores(rows: Iterable[Row], dataset: str, final: bool = False) -> None:
    """Stop where no row has scores (or final weights) at all.

    Raises:
        DataError: the dataset is not scored.
    """
    if not any(f"{side}_weight" in row.columns for row in rows for side in SIDES):
        what, _, fix = _NOTHING_THERE[final].partition("; ")
        raise DataError(what, where=dataset, fix=fix)


def hold_eos_scores(rows: Iterable[Row]) -> bool:
    """Whether a file holds EOS scores; rows without any score say nothing about that."""
    scored = [row for row in rows if all(f"{side}_weight" in row.columns for side in SIDES)]
    return bool(scored) and all(f"{side}_eos_weight" in row.columns for row in scored for side in SIDES)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _FLOAT32_END


def scored_columns(row: Row, chosen: Scores, rejected: Scores) -> dict[str, Any]:
    """The columns of a row with its scores in the file's sign; a float32 keeps its full precision."""
    columns = dict(row.columns)
    for side, scores in zip(SIDES, (chosen, rejected), strict=True):
        columns[f"{side}_weight"] = [_stored(r) for r in scores.tokens]
        columns[f"{side}_eos_weight"] = _stored(scores.eos)
    return columns


def _stored(r: float | None) -> float | None:
    # The shortest decimal that reads back as the same float32; 0.0 − r so that no −0.0 is written.
    return None if r is None else float(str(np.float32(0.0 - r)))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a split as JSON Lines."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for columns in rows:
            stream.write(json.dumps(columns, ensure_ascii=False) + "\n")


def read_manifest(dataset: Path) -> dict[str, Any] | None:
    """`estimate.json` beside a scored dataset, or None where there is none."""
    path = (dataset if dataset.is_dir() else dataset.parent) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise DataError("damaged: not a JSON object", where=str(path), fix="run `tisdpo estimate` again")
    return manifest


def recorded(manifest: dict[str, Any], split: Path) -> dict[str, Any] | None:
    """What `estimate.json` says of a split, or None where it says nothing."""
    counts = manifest.get("counts")
    known = counts.get(split.stem) if isinstance(counts, dict) else None
    return known if isinstance(known, dict) else None


def check_meaning(manifest: dict[str, Any], split: Path, final: bool) -> str | None:
    """What to tell where a split is no longer as it was scored, which is the user's right.

    Raises:
        UsageFault: it is as it was scored, and is to be taken for final weights.
    """
    known = recorded(manifest, split)
    if known is None:
        return None
    unchanged = known.get("sha256") == sha256(split)
    if final and unchanged:
        raise UsageFault(
            f"{split.name} holds scores, as {MANIFEST} says, not weights",
            where="--weights-are final",
            fix="leave it out to make weights of them",
        )
    return None if unchanged else f"{split.name} has changed since it was scored ({known.get('rows')} rows then)"


def unscored_needed(scores: Scores, kept: int, needs_eos: bool) -> str | None:
    """Which score (or final weight) a training under its settings would need and does not have, or None."""
    missing: Sequence[int] = [t for t, r in enumerate(scores.tokens[:kept]) if r is None]
    if missing:
        return f"token {missing[0]} has none (null: it was cut away when the file was made)"
    if needs_eos and scores.eos is None:
        return "the end-of-sequence token has none (null: it was cut away when the file was made)"
    return None
