"""Numbers of a whole split in blocks on disk: the same as those of all numbers in memory, and no pair is kept."""

from __future__ import annotations

import gc
import json
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import largest_file, pair_rows, run_here, write_jsonl

from tisdpo_cli.engine.inspection import comparison, disk_arrays, split_columns
from tisdpo_cli.engine.inspection.disk_arrays import Column, blocks, correlation, mean_ranks, order_statistics, spans
from tisdpo_cli.engine.inspection.exact_sums import ExactSums
from tisdpo_cli.engine.inspection.split_columns import SplitColumns
from tisdpo_cli.engine.inspection.weighted_pairs import WeightedResponse
from tisdpo_cli.errors import TrainingError
from tisdpo_cli.model.tokenizer import load_tokenizer


@pytest.fixture(params=[2**20, 7])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Everything in one block, or in many."""
    monkeypatch.setattr(disk_arrays, "BLOCK", request.param)
    return request.param


def test_a_column_holds_what_was_appended() -> None:
    column = Column(np.float32)
    assert column.tensor().tolist() == []
    column.append(torch.tensor([0.1, 2.0]))
    column.append([])
    assert column.array().tolist() == [np.float32(0.1), 2.0]
    column.append([3.0])
    assert len(column) == 3
    assert torch.equal(column.tensor(), torch.tensor([0.1, 2.0, 3.0]))


@pytest.mark.parametrize(
    "fill",
    [
        lambda: Column(np.int64).append(range(10**5)),
        lambda: [column := Column(np.int64), column.append(range(100)), column.array()],
        lambda: disk_arrays.empty(2**21, np.float64),
    ],
    ids=["append", "flush", "map"],
)
def test_no_room_for_temporary_files_is_told(fill: Callable[[], object]) -> None:
    directory = tempfile.gettempdir()
    with largest_file(200), pytest.raises(TrainingError) as caught:
        fill()
    assert caught.value.where == directory
    assert "TMPDIR" in caught.value.fix


def test_spans_are_between_ends() -> None:
    ends = Column(np.int64)
    ends.append([2, 2, 5])
    assert list(spans(ends)) == [(0, 2), (2, 2), (2, 5)]


def test_order_statistics_are_those_of_the_sorted_numbers(block: int) -> None:
    values = torch.tensor(np.random.default_rng(0).standard_normal(101), dtype=torch.float32).round(decimals=1)
    ordered = sorted(values.tolist())
    assert order_statistics(blocks(values), 101, (0.0, 0.005, 0.5, 0.99, 1.0)) == [
        ordered[i] for i in (0, 0, 50, 99, 100)
    ]
    assert order_statistics(blocks(values[:1]), 1, (0.005, 0.995)) == [float(values[0])] * 2


def test_ranks_and_correlation(block: int) -> None:
    draw = random.Random(0)
    values = [draw.choice([-1.0, 0.0, 0.5, 2.0, draw.random()]) for _ in range(50)]
    expected = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
    assert mean_ranks(torch.tensor(values)).tolist() == expected
    a, b = (torch.tensor(np.random.default_rng(i).standard_normal(50)) for i in (1, 2))
    assert correlation(a, b) == pytest.approx(float(np.corrcoef(a, b)[0, 1]), rel=1e-12)
    assert correlation(a, torch.ones(50, dtype=torch.float64)) is None


@pytest.mark.parametrize("kind", ["usual", "any"])
def test_sums_are_exact_in_any_order(kind: str) -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(3000).astype(np.float32)
    if kind == "any":
        values = generator.integers(0, 2**32, 3000, dtype=np.uint32).view(np.float32)
        values = np.where(np.isfinite(values), values, np.float32(1e-45))
    groups = generator.integers(0, 4, len(values))
    sums = ExactSums(4)
    for begin in range(0, len(values), 700):
        sums.add(groups[begin : begin + 700], values[begin : begin + 700])
    for group in range(4):
        assert sums.sum(group) == math.fsum(values[groups == group].tolist())
    assert sums.sum(1, 3) == math.fsum(values[(groups == 1) | (groups == 3)].tolist())


def scored(world: Path, folder: Path, rows: int) -> Path:
    tokenizer, draw = load_tokenizer(world / "sft"), random.Random(0)
    scored_rows = []
    for row in pair_rows(rows):
        for side in ("chosen", "rejected"):
            count = len(tokenizer.texts.encode([row[side]])[0])
            row[f"{side}_weight"] = [draw.gauss(0.3 if side == "rejected" else -0.3, 1) for _ in range(count)]
            row[f"{side}_eos_weight"] = 0.1
        scored_rows.append(row)
    write_jsonl(folder / "train.jsonl", scored_rows)
    tokenizer.backend.save_pretrained(folder)
    return folder


def test_an_inspection_does_not_depend_on_the_blocks(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = scored(world, tmp_path / "scored", 40)

    def inspect(*options: str) -> dict:
        done = run_here("inspect-weights", str(data), "--json", "--min-count", "2", *options)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        del found["provenance"]
        return found

    options = [("--limit", "40"), ("--compare", "rank_based", "--center", "position"), ("--compare", str(data))]
    whole = [inspect(*given) for given in options]
    monkeypatch.setattr(disk_arrays, "BLOCK", 64)
    monkeypatch.setattr(comparison, "BLOCK", 64)
    monkeypatch.setattr(split_columns, "_RESPONSES", 4)
    for given, expected in zip(options, whole, strict=True):
        found = inspect(*given)
        for token in [
            *(expected["comparison"] or {}).get("differing", []),
            *(found["comparison"] or {}).get("differing", []),
        ]:
            token |= {name: round(value, 12) for name, value in token.items() if isinstance(value, float)}
        assert found == expected


def test_pairs_are_not_kept(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, live, plain = scored(world, tmp_path / "scored", 60), [], SplitColumns.add

    def add(self: SplitColumns, *given: object) -> None:
        plain(self, *given)
        live.append(sum(type(thing) is WeightedResponse for thing in gc.get_objects()))

    monkeypatch.setattr(SplitColumns, "add", add)
    assert run_here("inspect-weights", str(data), "--table", str(tmp_path / "x.csv")).code == 0
    assert len(live) == 60
    assert max(live) <= 4
    rows = (tmp_path / "x.csv").read_text(encoding="utf-8").splitlines()
    assert len({line.split(",")[0] for line in rows[1:]}) == 60
