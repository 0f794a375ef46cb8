"""Writing a scored dataset from the parts of both sides: the rows come out in order, one after the other."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tisdpo_cli.data.dataset import Columns, DatasetSplit
from tisdpo_cli.data.dataset import Part as DatasetPart
from tisdpo_cli.data.pairs import Pair
from tisdpo_cli.data.rows import Row
from tisdpo_cli.data.splits import Split
from tisdpo_cli.data.tokens import EncodedPair, Response
from tisdpo_cli.engine.scoring.scored_output import ScoredOutput, write_scored_output
from tisdpo_cli.engine.scoring.scorer import Part, split_into_parts
from tisdpo_cli.files import sha256
from tisdpo_cli.runs.outputs import Output, claim

T = TypeVar("T")


class Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.make(index)

    def __iter__(self) -> Iterator[T]:
        return map(self.make, range(self.count))


def encoded(index: int) -> EncodedPair:
    draw = random.Random(index)

    def response() -> Response:
        uncut = draw.randint(1, 30)
        kept = draw.choice([uncut, uncut, draw.randint(0, uncut)])
        has_eos = kept == uncut
        return Response(list(range(kept + has_eos)), has_eos, uncut)

    return EncodedPair(index, f"x:{index}", [1] * draw.randint(1, 9), response(), response())


def split_of(rows: int) -> Split:
    source = DatasetSplit((DatasetPart("x", Path("x.jsonl"), Columns()),))
    pairs = Lazy(rows, lambda i: Pair(i, "p", "c", "r", Row(f"x:{i}", {"prompt": "p", "number": i})))
    return Split(source, pairs, Lazy(rows, encoded))  # type: ignore[arg-type]


def fill(folder: Path, split: Split, parts: Sequence[Part]) -> None:
    """Write parts with random log-probs, as scoring does."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part in parts:
        for side in ("forward", "reverse"):
            tensors = {}
            for number, batch in enumerate(part.batches):
                pairs = [split.encoded[i] for i in batch]
                size = sum(len(pair.chosen.ids) + len(pair.rejected.ids) for pair in pairs)
                tensors[str(number)] = generator.standard_normal(size, dtype=np.float32)
            save_file(tensors, folder / part.name(side))


def expected(split: Split, parts: Sequence[Part], folder: Path) -> list[dict[str, Any]]:
    """The score columns of every row, from all parts in memory at once."""
    rows: dict[int, dict[str, Any]] = {}
    for part in parts:
        plus, minus = (load_file(folder / part.name(side)) for side in ("forward", "reverse"))
        for number, batch in enumerate(part.batches):
            both = {"score": plus[str(number)] - minus[str(number)], "forward": plus[str(number)]}
            both["reverse"] = minus[str(number)]
            at = 0
            for side in ("chosen", "rejected"):
                for i in batch:
                    response = getattr(split.encoded[i], side)
                    end = at + len(response.ids)
                    row = rows.setdefault(i, {})
                    null = [None] * (response.uncut - response.kept)
                    for name, values in both.items():
                        own = values[at:end] if name != "score" else 0.0 - values[at:end]
                        decimals = [float(str(v)) for v in own]
                        tokens, eos = decimals[: response.kept] + null, decimals[response.kept :] or [None]
                        if name == "score":
                            row[f"{side}_weight"], row[f"{side}_eos_weight"] = tokens, eos[0]
                        else:
                            row[f"{side}_logps_{name}"] = tokens + eos
                    at = end
    return [rows[i] for i in range(len(split.encoded))]


def write(tmp_path: Path, split: Split, parts: Sequence[Part], keep_logps: bool = False) -> Output:
    output = claim(tmp_path / "out", "estimate", {}, overwrite=False)
    fill(output.parts, split, parts)
    tokenizer: Any = SimpleNamespace(save=lambda _folder: None)
    write_scored_output(ScoredOutput({}, {}, keep_logps), output, tokenizer, {"train": split}, parts)
    output.release()
    return output


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (70, 2), (200, 7)])
def test_the_file_holds_what_all_parts_in_memory_give(tmp_path: Path, rows: int, batch_size: int) -> None:
    split = split_of(rows)
    parts = split_into_parts("train", split.encoded, batch_size)
    fill(tmp_path / "parts", split, parts)
    want = expected(split, parts, tmp_path / "parts")
    output = write(tmp_path, split, parts, keep_logps=True)
    lines = (output.path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "p", "number": i, **columns} for i, columns in enumerate(want)
    ]
    tokens = [r for row in want for side in ("chosen", "rejected") for r in row[f"{side}_weight"]]
    assert output.record()["counts"]["train"] == {
        "rows": rows,
        "scored_tokens": sum(r is not None for r in tokens),
        "unscored_tokens": sum(r is None for r in tokens),
        "scored_eos": sum(row[f"{side}_eos_weight"] is not None for row in want for side in ("chosen", "rejected")),
        "sha256": sha256(output.path / "train.jsonl"),
    }


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It reads the file in blocks that are larger than the files here.
    monkeypatch.setattr("tisdpo_cli.engine.scoring.scored_output.sha256", lambda _: "")

    def peak(rows: int) -> int:
        split = split_of(rows)
        parts = split_into_parts("train", split.encoded, 4)
        tracemalloc.start()
        try:
            write(tmp_path / str(rows), split, parts)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    few, many = peak(200), peak(2000)
    # A few integers for each row; its scores as Python numbers would take about 2,000 bytes.
    assert many - few < 1800 * 150
