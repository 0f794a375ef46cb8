"""Scores of all rows, from the parts of both sides, written as a scored dataset with its manifest and tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import load_file

from tisdpo_cli.data.scored import MANIFEST, Logps, Scores, scored_columns, write_rows
from tisdpo_cli.data.splits import Split
from tisdpo_cli.data.stored_tokens import pair_lengths
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
        types: split to the types of its columns in Parquet; without it JSON Lines are written.
    """

    manifest: Mapping[str, Any]
    record: Mapping[str, Any]
    keep_logps: bool
    types: Mapping[str, Mapping[str, Any]] | None = None


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
            rows, count = _scored_rows(split, [part for part in parts if part.split == name], output.parts), _Counts()
            columns = (
                scored_columns(pair.row, *row.scores, row.logps if scored.keep_logps else None)
                for pair, row in zip(split.pairs, count.counted(rows), strict=True)
            )
            types = None if scored.types is None else scored.types[name]
            file = staged / f"{name}{'.jsonl' if types is None else '.parquet'}"
            write_rows(file, columns, types)
            counts[name] = {**asdict(count), "sha256": sha256(file)}
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


@dataclass
class _Counts:
    """What a split holds, counted as its rows are written."""

    rows: int = 0
    scored_tokens: int = 0
    unscored_tokens: int = 0
    scored_eos: int = 0

    def counted(self, rows: Iterable[_ScoredRow]) -> Iterator[_ScoredRow]:
        """The rows, each counted."""
        for row in rows:
            self.rows += 1
            for scores in row.scores:
                known = sum(r is not None for r in scores.tokens)
                self.scored_tokens += known
                self.unscored_tokens += len(scores.tokens) - known
                self.scored_eos += scores.eos is not None
            yield row


def _scored_rows(split: Split, parts: Sequence[Part], folder: Path) -> Iterator[_ScoredRow]:
    """The scores of every row of a split, in the order of the rows."""
    lengths = pair_lengths(split.encoded)[:, 1:]
    with ExitStack() as stack:
        plus, minus = (stack.enter_context(_in_row_order(lengths, parts, folder, side)) for side in _SIDES)
        for pair in split.encoded:
            first, second = (_next_response(response, plus, minus) for response in (pair.chosen, pair.rejected))
            yield _ScoredRow((first[0], second[0]), (first[1], second[1]))


def _in_row_order(lengths: np.ndarray, parts: Sequence[Part], folder: Path, side: str) -> IO[bytes]:
    """A temporary file with the log-probs of one side, float32, row after row: chosen, then rejected.

    Args:
        lengths: [rows, 2] tokens of both responses of each row.
        parts: of the split.
        folder: where they are.
        side: `forward` or `reverse`.
    """
    ends = lengths.reshape(-1).cumsum()
    stream = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the caller closes it
    for part in parts:
        values = load_file(folder / part.name(side))
        for number, batch in enumerate(part.batches):
            # A batch holds all its chosen responses, then all rejected ones.
            responses = np.concatenate([np.array(batch) * 2, np.array(batch) * 2 + 1])
            sizes = lengths.reshape(-1)[responses]
            pieces = np.split(values[str(number)], sizes.cumsum()[:-1])
            for begin, piece in zip(ends[responses] - sizes, pieces, strict=True):
                stream.seek(int(begin) * piece.itemsize)
                stream.write(piece.tobytes())
    stream.seek(0)
    return stream


def _next_response(response: Response, plus: IO[bytes], minus: IO[bytes]) -> tuple[Scores, Logps]:
    """The scores and log-probs of the response that comes next in the log-probs of both sides."""
    kept, size = response.kept, len(response.ids)
    forward, reverse = (np.frombuffer(stream.read(4 * size), np.float32, size) for stream in (plus, minus))
    unscored: list[float | None] = [None] * (response.uncut - kept)

    def column(values: np.ndarray) -> list[float | None]:
        return [*values[:kept].tolist(), *unscored, float(values[kept]) if response.has_eos else None]

    *tokens, eos = column(forward - reverse)
    return Scores(tokens, eos), dict(zip(_SIDES, map(column, (forward, reverse)), strict=True))
