"""Reads and writes scored datasets: the only place that knows their columns and their sign.

A file holds `−r_t = log π⁻ − log π⁺` in both weight columns, for every token of the untruncated response without its
EOS (null if not scored), and the EOS scores in separate columns. The rest of the program uses r_t. A file of final
weights has the same columns, which hold the weights unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tisdpo_cli.data.parquet_output import parquet_columns, write_parquet
from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.data.stdin import STDIN
from tisdpo_cli.errors import DataError, UsageError
from tisdpo_cli.files import sha256

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "estimate.json"
SIDES = ("chosen", "rejected")
# Columns of scores (or final weights), and those of the EOS.
WEIGHT_COLUMNS = tuple(f"{side}_weight" for side in SIDES)
EOS_COLUMNS = tuple(f"{side}_eos_weight" for side in SIDES)
# Values of at least this size become infinite in float32.
_FLOAT32_END = 2.0**128 - 2.0**103


@dataclass(frozen=True)
class Scores:
    """Scores r of one response in nats, or its weights in a file of final weights.

    Attributes:
        tokens: score of each token, None if not scored.
        eos: score of the EOS, None if not scored.
    """

    tokens: list[float | None]
    eos: float | None

    @property
    def known(self) -> list[float]:
        """The scores that are not None."""
        return [r for r in self.tokens if r is not None]


def read_scores(row: Row, side: str, tokens: int, shown: str, final: bool = False) -> Scores | BadRow:
    """Read the scores of one side of a row, and check them against the number of tokens of its response.

    Args:
        row: row with all its columns.
        side: `chosen` or `rejected`.
        tokens: tokens of the untruncated response under the tokenizer in use, without the EOS.
        shown: name of the tokenizer in messages.
        final: whether the file holds final weights.
    """
    column = f"{side}_weight"
    if column not in row.columns:
        return BadRow(row.where, f"no column {column!r}: {_MISSING[final]}")
    values = row.columns[column]
    if not isinstance(values, list):
        return BadRow(row.where, f"{column!r} must be a list of numbers")
    for position, value in enumerate(values):
        if value is not None and not _is_number(value):
            return BadRow(
                row.where, f"{column!r} contains {_shorten(value)} at position {position}; a float32 number is needed"
            )
    if len(values) != tokens:
        mismatch = f"but the response has {tokens} tokens ({shown})"
        if final and len(values) == tokens + 1:
            mismatch = f"one more than tokens ({shown}); put the weight of the EOS in {_eos_column(side)!r}"
        return BadRow(row.where, f"{column!r} has {len(values)} values, {mismatch}")
    eos = row.columns.get(_eos_column(side))
    if eos is not None and not _is_number(eos):
        return BadRow(row.where, f"{_eos_column(side)!r} must be a number")
    sign = 1.0 if final else -1.0
    return Scores([None if v is None else sign * v for v in values], None if eos is None else sign * eos)


# Error and fix if there are no scores, or no final weights.
_MISSING = {
    False: "the dataset is not scored; score it with `tisdpo estimate`",
    True: "the dataset has no final weights; add one number per response token, without the EOS",
}


def weight_count(row: Row, side: str) -> int | None:
    """Return how many scores (or final weights) one side of a row has, or None if they are no list."""
    values = row.columns.get(f"{side}_weight")
    return len(values) if isinstance(values, list) else None


def has_weights(rows: Iterable[Row]) -> bool:
    """Return whether any row has scores (or final weights)."""
    return any(f"{side}_weight" in row.columns for row in rows for side in SIDES)


def require_scores(rows: Iterable[Row], dataset: str, final: bool = False) -> None:
    """Raise an error if no row has scores (or final weights).

    Raises:
        DataError: the dataset is not scored.
    """
    if not has_weights(rows):
        what, _, fix = _MISSING[final].partition("; ")
        raise DataError(what, where=dataset, fix=fix)


def has_eos_scores(rows: Iterable[Row]) -> bool:
    """Return whether any row of a file has EOS scores in addition to the others."""
    return any(f"{side}_weight" in row.columns and _eos_column(side) in row.columns for row in rows for side in SIDES)


def missing_eos_column(row: Row, side: str) -> BadRow | None:
    """Return the problem of a row without an EOS column in a file that has some; null marks a truncated response."""
    if _eos_column(side) in row.columns:
        return None
    return BadRow(
        row.where,
        f"no column {_eos_column(side)!r}, which other rows or the other side have; add it to all rows or to none, or "
        "set --eos-weight zero or one",
    )


def _eos_column(side: str) -> str:
    return f"{side}_eos_weight"


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f"{text[:20]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _FLOAT32_END


Logps = dict[str, list[float | None]]
# The contrastive models, in the column names of their log-probs.
_MODELS = ("forward", "reverse")


def scored_columns(
    row: Row, chosen: Scores, rejected: Scores, logps: tuple[Logps, Logps] | None = None
) -> dict[str, Any]:
    """Return the columns of a row with its scores in the file's sign and full float32 precision.

    Args:
        row: row as read.
        chosen: scores of the chosen response.
        rejected: scores of the rejected response.
        logps: optional log-probs of both responses under `forward` and `reverse`: of every token of the untruncated
            response (None if truncated) and of its EOS (None if it has none).
    """
    # Log-probs of a previous scoring would not match these scores.
    stale = {f"{side}_logps_{model}" for side in SIDES for model in _MODELS}
    columns = {name: value for name, value in row.columns.items() if name not in stale}
    for side, scores in zip(SIDES, (chosen, rejected), strict=True):
        # 0.0 − r, so that −0.0 is never written.
        columns[f"{side}_weight"] = [None if r is None else _shortest(0.0 - r) for r in scores.tokens]
        columns[_eos_column(side)] = None if scores.eos is None else _shortest(0.0 - scores.eos)
    for side, side_logps in zip(SIDES, logps or (), strict=False):
        for model in _MODELS:
            columns[f"{side}_logps_{model}"] = [None if x is None else _shortest(x) for x in side_logps[model]]
    return columns


def scored_types(rows: Callable[[], Iterable[Row]], keep_logps: bool) -> dict[str, pa.DataType]:
    """Return the Arrow type of every column that `scored_columns` gives.

    Scores are float64, whose decimals are those of the JSON Lines file: the same numbers come back from both.

    Args:
        rows: gives the rows as read, anew each time.
        keep_logps: whether log-probs get columns too.

    Raises:
        DataError: a column has no one type.
    """
    import pyarrow as pa

    values = pa.list_(pa.float64())
    scores: dict[str, pa.DataType] = {}
    for side in SIDES:
        scores |= {f"{side}_weight": values, _eos_column(side): pa.float64()}
    logps = {f"{side}_logps_{model}": values for side in SIDES for model in _MODELS}
    own = scores | logps

    def others() -> Iterator[Row]:
        for row in rows():
            yield Row(row.where, {name: value for name, value in row.columns.items() if name not in own})

    return {**parquet_columns(others, "write --format jsonl"), **scores, **(logps if keep_logps else {})}


def read_logps(row: Row, side: str, tokens: int) -> Logps | BadRow | None:
    """Read the log-probs of one side of a row as `scored_columns` writes them, or None if the file has none."""
    logps: Logps = {}
    for model in _MODELS:
        column = f"{side}_logps_{model}"
        values = row.columns.get(column)
        if values is None:
            return None
        if not isinstance(values, list) or not all(v is None or _is_number(v) for v in values):
            return BadRow(row.where, f"{column!r} must be a list of numbers")
        if len(values) != tokens + 1:
            mismatch = f"the response has {tokens} tokens and an EOS"
            return BadRow(row.where, f"{column!r} has {len(values)} values, but {mismatch}")
        logps[model] = values
    return logps


def _shortest(value: float) -> float:
    """The shortest decimal that reads back as the same float32."""
    return float(str(np.float32(value)))


def write_rows(path: Path, rows: Iterable[dict[str, Any]], types: Mapping[str, pa.DataType] | None = None) -> None:
    """Write a split as JSON Lines, or as Parquet if the types of its columns are given."""
    if types is not None:
        write_parquet(path, rows, types)
        return
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for columns in rows:
            stream.write(json.dumps(columns, ensure_ascii=False) + "\n")


def read_manifest(dataset: Path) -> dict[str, Any] | None:
    """Read the `estimate.json` of a scored dataset, or None if it has none.

    Raises:
        DataError: the file is damaged.
    """
    if str(dataset) == STDIN:
        return None
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
    """Return the record of a split in `estimate.json`, or None if it has none."""
    counts = manifest.get("counts")
    record = counts.get(split.name.split(".")[0]) if isinstance(counts, dict) else None
    return record if isinstance(record, dict) else None


def check_unchanged(manifest: dict[str, Any], split: Path, final: bool) -> str | None:
    """Compare a split with its record in `estimate.json`.

    Args:
        manifest: content of `estimate.json`, empty if there is none.
        split: file of the split.
        final: whether the file is used as final weights.

    Returns:
        A message if the split has changed since it was scored, which is allowed, or None.

    Raises:
        UsageError: the split is unchanged, but used as final weights.
    """
    record = split_record(manifest, split)
    unchanged = record is not None and record.get("sha256") == sha256(split)
    if final and unchanged:
        raise UsageError(
            f"{split.name} holds scores according to {MANIFEST}, not final weights",
            where="--weights-are final",
            fix="drop the option to transform the scores",
        )
    if final and manifest:
        return f"{split.name} has an {MANIFEST} in its directory: if its columns are still scores, the sign is wrong"
    if record is None or unchanged:
        return None
    return f"{split.name} has changed since it was scored ({record.get('rows')} rows then)"


def missing_score(scores: Scores, kept: int, needs_eos: bool, final: bool = False) -> str | None:
    """Return which score (or final weight) is missing for a training, or None.

    Args:
        scores: scores of one response.
        kept: number of its tokens after truncation, without the EOS.
        needs_eos: whether the score of the EOS is needed.
        final: whether they are final weights.
    """
    what = "weight" if final else "score"
    missing: Sequence[int] = [t for t, r in enumerate(scores.tokens[:kept]) if r is None]
    if missing:
        return f"token {missing[0]} has no {what} (null)"
    if needs_eos and scores.eos is None:
        return f"the EOS has no {what} (null, or no EOS column)"
    return None
