"""Which splits of a dataset are used, and which of their rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import pair_rows, read_jsonl, run_here, write_jsonl

from tisdpo_cli.data.dataset import Columns, DatasetSplit, Part
from tisdpo_cli.data.examples import read_examples
from tisdpo_cli.data.locate import find_splits, training_splits
from tisdpo_cli.data.pairs import Pairs, read_split_pairs
from tisdpo_cli.data.reader import read_rows
from tisdpo_cli.errors import DataError, UsageError

ROWS = pair_rows(20)


def names_of(*arguments: object) -> dict[str, str]:
    """Role to the name of the file in use."""
    return {role: path.name for role, path in training_splits(*arguments).items()}  # type: ignore[arg-type]


def parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(path: Path, limit: int | None = None, size: float | None = None, for_test: bool = False) -> Pairs:
    return read_split_pairs(DatasetSplit((Part(str(path), path, Columns()),), limit, size, for_test), "error")


# Splits ------------------------------------------------------------------------------------------------------------


def test_splits_have_names(tmp_path: Path) -> None:
    for name in ("train_prefs", "test_prefs", "train_sft", "test_sft", "odd"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS[:1])
    (tmp_path / "run.json").write_text("{}")
    folder = str(tmp_path)
    assert set(find_splits(folder)) == {"train_prefs", "test_prefs", "train_sft", "test_sft", "odd"}
    assert names_of(folder, "train_prefs") == {"train": "train_prefs.jsonl", "test": "test_prefs.jsonl"}
    assert names_of(folder, "odd") == {"train": "odd.jsonl"}
    assert names_of(folder, "odd", "test_sft") == {"train": "odd.jsonl", "test": "test_sft.jsonl"}
    with pytest.raises(UsageError, match=r"--split: .* has no split 'train'; available: .*train_prefs"):
        training_splits(folder)
    with pytest.raises(UsageError, match=r"--eval-split: .* has no split 'dev'"):
        training_splits(folder, "odd", "dev")
    with pytest.raises(UsageError, match=r"has no split 'test'; available: train$"):
        training_splits(str(tmp_path / "odd.jsonl"), "test")


@pytest.mark.parametrize(("folder", "end"), [("data", ""), (".", "-0123456789abcdef")])
def test_shards_of_a_download_are_one_split(tmp_path: Path, folder: str, end: str) -> None:
    root = tmp_path / "a[1]"
    root.mkdir()
    for number in (1, 0):
        parquet(root / folder / f"train-{number:05}-of-00002{end}.parquet", ROWS[number * 10 : number * 10 + 10])
    parquet(root / folder / f"test-00000-of-00001{end}.parquet", ROWS[:2])
    splits = training_splits(str(root))
    assert [row.columns for row in read_rows(splits["train"])] == ROWS
    assert [row.columns for row in read_rows(splits["test"])] == ROWS[:2]
    (root / folder / f"train-00000-of-00002{end}.parquet").unlink()
    with pytest.raises(DataError, match=r"missing or left over: 1 are there, beginning with train-00001"):
        training_splits(str(root))
    assert find_splits(str(root))["test"] == splits["test"]
    write_jsonl(root / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"has .*train.jsonl.*; keep one of them"):
        training_splits(str(root))


# Rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 0.3])
def test_held_out_rows_are_in_one_split_only(tmp_path: Path, size: float) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS[:10] * 2)

    def places(limit: int | None, held_out: bool) -> list[str]:
        pairs = read(path, limit, size, held_out).pairs
        assert [pair.index for pair in pairs] == list(range(len(pairs)))
        return [pair.row.where for pair in pairs]

    train, test = places(None, held_out=False), places(None, held_out=True)
    assert len(test) == 6
    assert sorted([*train, *test]) == sorted(f"{path}:{line}" for line in range(1, 21))
    # A limit leaves the test rows as they are.
    assert places(3, held_out=False) == train[:3]
    assert places(None, held_out=True) == test
    lines = {int(place.rpartition(":")[2]) for place in test}
    apart = sum((line + 9) % 20 + 1 not in lines for line in lines)
    assert apart
    (said,) = (notice for notice in read(path, None, size).notices if "held out" in notice)
    assert said == (
        f"x.jsonl: 6 rows held out for evaluation; {apart} of them have a prompt that training rows have too"
    )


@pytest.mark.parametrize("size", [20, 0.001, 0.999])
def test_holding_out_leaves_rows_on_both_sides(tmp_path: Path, size: float) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(UsageError, match=r"--eval-size: holds out .* of 20 rows"):
        read(path, None, size)


def test_what_is_behind_the_limit_is_not_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    path.write_text(path.read_text() + "broken\n")
    assert len(read(path, 20).pairs) == 20
    with pytest.raises(DataError, match=r"x.jsonl:21"):
        read(path, 21)


def test_both_sides_of_a_pair_are_held_out_together(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    sides = []
    for for_test in (False, True):
        split = DatasetSplit((Part("x", path, Columns()),), None, 4, for_test)
        examples, _ = read_examples(split, "both", "{instruction}", "error")
        sides.append([example.where for example in examples])
    assert [len(places) for places in sides] == [32, 8]
    assert not set(sides[0]) & set(sides[1])


# Commands ----------------------------------------------------------------------------------------------------------


def test_a_pipeline_splits_its_rows_once(world: Path, tmp_path: Path) -> None:
    arguments = (
        "run", "-m", world / "sft", "-d", world / "data" / "train.jsonl", "-o", tmp_path / "out", "--method", "prompt",
        "--set", "eval_size=5", "--set", "limit=9", "--max-steps", "1", "--set", "batch_size=4",
    )  # fmt: skip
    done = run_here(*arguments)
    assert done.code == 0, done.err
    train, test = (read_jsonl(tmp_path / "out" / "scored" / f"{name}.jsonl") for name in ("train", "test"))
    prompts = [row["prompt"] for row in read_jsonl(world / "data" / "train.jsonl")]
    held = {row["prompt"] for row in test}
    assert len(held) == 5
    assert [row["prompt"] for row in train] == [prompt for prompt in prompts if prompt not in held][:9]
    assert "9 pairs" in done.err
    assert read_jsonl(tmp_path / "out" / "tisdpo" / "metrics.jsonl")[0]["eval/loss"] > 0
    # Another choice is another result.
    changed = run_here(*arguments, "--set", "eval_size=6")
    assert changed.code == 0, changed.err
    assert "estimate: redo: data.eval_size 5 → 6" in changed.err
    assert len(read_jsonl(tmp_path / "out" / "scored" / "test.jsonl")) == 6


def test_a_test_split_and_held_out_rows_exclude_each_other(world: Path, tmp_path: Path) -> None:
    common = ("train-dpo", "-m", world / "sft", "-o", tmp_path / "out", "--eval-size", "4", "--dry-run")
    done = run_here(*common, "-d", world / "data")
    assert done.code == 2
    assert done.error.endswith(
        "--eval-size: the dataset has the split 'test' to evaluate on; leave it out, or give --dataset the file of one "
        "split"
    )
    assert run_here(*common, "-d", world / "data", "--eval-split", "test").code == 2
    assert run_here(*common, "-d", world / "data" / "train.jsonl").code == 0


def test_the_next_command_repeats_what_it_needs(contrast: Path, tmp_path: Path) -> None:
    done = run_here(
        "estimate", "--forward", contrast / "dpo", "--reverse", contrast / "reverse", "-d", contrast / "data",
        "-o", tmp_path / "scored", "--limit", "3", "--max-length", "600", "--eval-split", "test",
    )  # fmt: skip
    assert done.code == 0, done.err
    (following,) = [line for line in done.err.splitlines() if line.startswith("next:")]
    assert "--max-length 600" in following
    assert "--limit" not in following
    assert "--eval-split" not in following
