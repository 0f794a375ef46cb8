"""Scores of all rows, from the parts of both sides, written as a scored dataset with its manifest and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tisdpo_cli.data.scored import MANIFEST, Logps, Scores, scored_columns, write_rows
from tisdpo_cli.data.splits import Split
from tisdpo_cli.data.tokens import Response
from tisdpo_cli.engine.scoring.scorer import Part
from tisdpo_cli.files import reporting_write_errors, sha256, write_json
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.runs.outputs import Output, apply_umask, versions

_SIDES = ("forward", "reverse")


@dataclass(frozen=True)
class ScoredOutput:
    """What is written beside the scores.

    Attributes:
        manifest: the first part of `estimate.json`.
        record: the first part of `run.json`.
        keep_logps: whether log-probs under both models get columns too.
    """

    manifest: Mapping[str, Any]
    record: Mapping[str, Any]
    keep_logps: bool


@dataclass(frozen=True)
class _ScoredRow:
    """Both responses of a row: scores r = log π⁺ − log π⁻, and the log-probs they come from."""

    scores: tuple[Scores, Scores]
    logps: tuple[Logps, Logps]


def write_scored_output(
    scored: ScoredOutput, output: Output, tokenizer: Tokenizer, splits: Mapping[str, Split], parts: Sequence[Part]
) -> None:
    """Write the scored dataset, its manifest and its tokenizer, and mark the output as finished."""
    counts = {}
    with reporting_write_errors(output.path):
        staged = output.staging()
        for name, split in splits.items():
            rows = _scored_rows(split, [part for part in parts if part.split == name], output.parts)
            columns = (
                scored_columns(pair.row, *row.scores, row.logps if scored.keep_logps else None)
                for pair, row in zip(split.pairs, rows, strict=True)
            )
            write_rows(staged / f"{name}.jsonl", columns)
            counts[name] = {**_counts([row.scores for row in rows]), "sha256": sha256(staged / f"{name}.jsonl")}
        tokenizer.save(staged)
        write_json(
            staged / MANIFEST,
            {
                **scored.manifest,
                "counts": counts,
                "sign": "files hold -r = log pi_reverse - log pi_forward",
                "versions": versions(),
            },
        )
        apply_umask([file for file in staged.rglob("*") if file.is_file()])
        files = output.publish(staged)
    output.finish({**scored.record, "counts": counts}, files)


def _scored_rows(split: Split, parts: Sequence[Part], folder: Path) -> list[_ScoredRow]:
    """The scores of every row of a split, in the order of the rows."""
    rows: dict[int, _ScoredRow] = {}
    for part in parts:
        forward, reverse = (load_file(folder / part.name(side)) for side in _SIDES)
        for number, batch in enumerate(part.batches):
            plus, minus = forward[str(number)], reverse[str(number)]
            columns = [iter(values.tolist()) for values in (plus - minus, plus, minus)]
            chosen, rejected = (
                [_take(columns, response) for response in responses]
                for responses in ([split.encoded[i].chosen for i in batch], [split.encoded[i].rejected for i in batch])
            )
            for i, first, second in zip(batch, chosen, rejected, strict=True):
                rows[i] = _ScoredRow((first[0], second[0]), (first[1], second[1]))
    return [rows[i] for i in range(len(split.encoded))]


def _take(columns: Sequence[Iterator[float]], response: Response) -> tuple[Scores, Logps]:
    """The values of the next response in the columns r, log π⁺ and log π⁻."""
    values = [[*islice(column, response.kept), *[None] * (response.uncut - response.kept)] for column in columns]
    eos = [next(column) if response.has_eos else None for column in columns]
    logps = {name: [*values[i], eos[i]] for i, name in enumerate(_SIDES, start=1)}
    return Scores(values[0], eos[0]), logps


def _counts(scores: Sequence[tuple[Scores, Scores]]) -> dict[str, Any]:
    responses = [response for both in scores for response in both]
    return {
        "rows": len(scores),
        "scored_tokens": sum(r is not None for response in responses for r in response.tokens),
        "unscored_tokens": sum(r is None for response in responses for r in response.tokens),
        "scored_eos": sum(response.eos is not None for response in responses),
    }
