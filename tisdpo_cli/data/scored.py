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

from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.errors import DataError, UsageError
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
                row.where, f"{column!r} holds {_told(value)} at position {position}; a float32 number is needed"
            )
    if len(values) != tokens:
        what = f"but the response has {tokens} tokens ({shown})"
        if final and len(values) == tokens + 1:
            what = f"one more than tokens ({shown}): the end of the sequence goes in {_eos_column(side)!r}"
        return BadRow(row.where, f"{column!r} has {len(values)} values, {what}")
    eos = row.columns.get(_eos_column(side))
    if eos is not None and not _is_number(eos):
        return BadRow(row.where, f"{_eos_column(side)!r} must be a number")
    sign = 1.0 if final else -1.0
    return Scores([None if v is None else sign * v for v in values], None if eos is None else sign * eos)


_NOTHING_THERE = {
    False: "this dataset is not scored; make it with `tisdpo estimate`",
    True: "there are no final weights; they are one number per response token, the end of the sequence left out",
}


def has_weights(rows: Iterable[Row]) -> bool:
    """Whether any row has scores (or final weights)."""
    return any(f"{side}_weight" in row.columns for row in rows for side in SIDES)


def require_scores(rows: Iterable[Row], dataset: str, final: bool = False) -> None:
    """Stop where no row has scores (or final weights) at all.

    Raises:
        DataError: the dataset is not scored.
    """
    if not has_weights(rows):
        what, _, fix = _NOTHING_THERE[final].partition("; ")
        raise DataError(what, where=dataset, fix=fix)


def has_eos_scores(rows: Iterable[Row]) -> bool:
    """Whether any row of a file has EOS scores beside the others."""
    return any(f"{side}_weight" in row.columns and _eos_column(side) in row.columns for row in rows for side in SIDES)


def missing_eos_column(row: Row, side: str) -> BadRow | None:
    """What is wrong with a row that has no EOS column, in a file that has some; null is a cut response, and fine."""
    if _eos_column(side) in row.columns:
        return None
    return BadRow(
        row.where,
        f"no column {_eos_column(side)!r}, which other rows or the other side have: give it to all or to none, or set "
        "--eos-weight zero or one",
    )


def _eos_column(side: str) -> str:
    return f"{side}_eos_weight"


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f"{text[:20]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _FLOAT32_END


Logps = dict[str, list[float | None]]
# Models of the contrast, in the names of the columns of their log-probs.
_MODELS = ("forward", "reverse")


def scored_columns(
    row: Row, chosen: Scores, rejected: Scores, logps: tuple[Logps, Logps] | None = None
) -> dict[str, Any]:
    """The columns of a row with its scores in the file's sign; a float32 keeps its full precision.

    Args:
        row: as it was read.
        chosen: scores of the chosen response.
        rejected: … and of the rejected one.
        logps: where they are kept, log-probs of both responses under `forward` and `reverse`: of every token of the
            uncut response (None beyond the cut) and of its EOS (None where it has none).
    """
    # Log-probs of an earlier scoring would no longer belong to these scores.
    stale = {f"{side}_logps_{model}" for side in SIDES for model in _MODELS}
    columns = {name: value for name, value in row.columns.items() if name not in stale}
    for side, scores in zip(SIDES, (chosen, rejected), strict=True):
        # 0.0 − r so that no −0.0 is written.
        columns[f"{side}_weight"] = [None if r is None else _stored(0.0 - r) for r in scores.tokens]
        columns[_eos_column(side)] = None if scores.eos is None else _stored(0.0 - scores.eos)
    for side, both in zip(SIDES, logps or (), strict=False):
        for model in _MODELS:
            columns[f"{side}_logps_{model}"] = [None if x is None else _stored(x) for x in both[model]]
    return columns


def read_logps(row: Row, side: str, tokens: int) -> Logps | BadRow | None:
    """The log-probs of one side of a row as `scored_columns` has them, or None where the file keeps none."""
    found: Logps = {}
    for model in _MODELS:
        column = f"{side}_logps_{model}"
        values = row.columns.get(column)
        if values is None:
            return None
        if not isinstance(values, list) or not all(v is None or _is_number(v) for v in values):
            return BadRow(row.where, f"{column!r} must be a list of numbers")
        if len(values) != tokens + 1:
            told = f"the response has {tokens} tokens and an end of the sequence"
            return BadRow(row.where, f"{column!r} has {len(values)} values, but {told}")
        found[model] = values
    return found


def _stored(value: float) -> float:
    # The shortest decimal that reads back as the same float32.
    return float(str(np.float32(value)))


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


def split_record(manifest: dict[str, Any], split: Path) -> dict[str, Any] | None:
    """What `estimate.json` says of a split, or None where it says nothing."""
    counts = manifest.get("counts")
    known = counts.get(split.stem) if isinstance(counts, dict) else None
    return known if isinstance(known, dict) else None


def check_unchanged(manifest: dict[str, Any], split: Path, final: bool) -> str | None:
    """What to tell where a split is not as it was scored, which is the user's right.

    Raises:
        UsageError: it is as it was scored, and is to be taken for final weights.
    """
    known = split_record(manifest, split)
    unchanged = known is not None and known.get("sha256") == sha256(split)
    if final and unchanged:
        raise UsageError(
            f"{split.name} holds scores, as {MANIFEST} says, not weights",
            where="--weights-are final",
            fix="leave it out to make weights of them",
        )
    if final and manifest:
        return f"{split.name} lies beside an {MANIFEST}: if these columns are still scores, the sign is wrong"
    if known is None or unchanged:
        return None
    return f"{split.name} has changed since it was scored ({known.get('rows')} rows then)"


def missing_score(scores: Scores, kept: int, needs_eos: bool, final: bool = False) -> str | None:
    """Which score (or final weight) a training under its settings would need and does not have, or None."""
    what = "weight" if final else "score"
    missing: Sequence[int] = [t for t, r in enumerate(scores.tokens[:kept]) if r is None]
    if missing:
        return f"token {missing[0]} has no {what} (null)"
    if needs_eos and scores.eos is None:
        return f"the end-of-sequence token has no {what} (null, or no column for it)"
    return None
