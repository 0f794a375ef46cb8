"""Work before the processes join: done once, told in its place, and values of many pairs outside of memory."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Listener, largest_file, run_here, write_jsonl

from tisdpo_cli.cli import start
from tisdpo_cli.data import row_store, tokenizing
from tisdpo_cli.engine.prepared import Prepared
from tisdpo_cli.engine.training.float_pairs import FloatPairs, FloatWriter
from tisdpo_cli.engine.training.reference import PassLogps
from tisdpo_cli.engine.training.weighted_pairs import WeightedPairs
from tisdpo_cli.errors import DataError, UsageError
from tisdpo_cli.reporter import Reporter


class Order(Listener):
    """All messages in one list."""

    def warn(self, text: str) -> None:
        self.said.append(f"warning: {text}")


@pytest.mark.parametrize("early", [False, True])
def test_work_is_done_once_and_told_when_its_result_is_asked_for(early: bool) -> None:
    done: list[str] = []

    def work(reporter: Reporter) -> str:
        reporter.note("one")
        reporter.warn("two")
        reporter.note("three")
        done.append("work")
        return "result"

    prepared = Prepared(work)
    if early:
        prepared.start()
        prepared.start()
    assert len(done) == early
    order = Order()
    order.note("before")
    assert prepared.result(order) == "result"
    assert order.said == ["before", "one", "warning: two", "three"]
    assert done == ["work"]


def test_an_error_of_the_user_waits_and_any_other_does_not() -> None:
    def unusable(reporter: Reporter) -> None:
        reporter.note("read")
        raise DataError("no", where="x:1")

    prepared, order = Prepared(unusable), Order()
    prepared.start()
    with pytest.raises(DataError, match="x:1: no"):
        prepared.result(order)
    assert order.said == ["read"]

    def interrupted(_reporter: Reporter) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Prepared(interrupted).start()


@pytest.mark.parametrize("command", ["train-dpo", "train-sft", "estimate"])
def test_rows_are_tokenized_before_the_processes_join(
    command: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from tisdpo_cli.data.row_store import RowStore
    from tisdpo_cli.runs.runtime import Runtime

    events: list[str] = []
    join, file = Runtime.__init__, RowStore.file
    monkeypatch.setattr(Runtime, "__init__", lambda self, *given: events.append("join") or join(self, *given))
    monkeypatch.setattr(RowStore, "file", lambda self, *given: events.append("rows") or file(self, *given))
    models = (
        ["--forward", world / "sft", "--reverse", world / "sft"] if command == "estimate" else ["-m", world / "sft"]
    )
    more = ["--max-steps", "1"] if command != "estimate" else []
    arguments = [command, *models, "-d", world / "data", "-o", tmp_path / "out", *more]
    done = run_here(*arguments)
    assert done.code == 0, done.err
    assert events[0] == "join", "a process that is alone claims its output first"
    events.clear()

    def join_of_two(*_given: object) -> None:
        events.append("join")
        raise UsageError("there is no other process")

    monkeypatch.setattr(Runtime, "__init__", join_of_two)
    # One of several leaves at once, and this process with it.
    monkeypatch.setattr(start, "leave", sys.exit)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_here(*arguments, "--overwrite").code == 2
    assert events[0] == "rows"
    assert events[-1] == "join"
    events.clear()
    run_here(*arguments)
    assert events == ["join"], "what is finished needs no rows"


def test_a_large_dataset_shows_progress_and_a_warning_stops_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "_SHOWN_FROM", 10)
    (tmp_path / "file").write_text("in the way")
    arguments = ["train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", "--max-steps", "1"]
    done = run_here(*arguments, "--cache-dir", tmp_path / "file")
    assert done.code == 0, done.err
    assert "tokenizing 24/24 pairs" in done.err
    assert "tokenizing 8/8 pairs" not in done.err
    assert f"warning: {tmp_path / 'file'}/rows/" in done.err


def test_a_used_directory_is_said_before_bad_rows(world: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "c", "rejected": 3}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    arguments = ["train-dpo", "-m", world / "sft", "-d", data, "-o"]
    assert run_here(*arguments, tmp_path / "out").code == 2
    assert run_here(*arguments, tmp_path / "new").code == 1


# Values outside of memory -----------------------------------------------------------------------------------------


def pairs_of_values(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = random.Random(count)
    return [tuple(torch.randn(draw.randint(0, 5)) for _ in range(2)) for _ in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("limit", [None, 0, 100])
def test_values_come_back_wherever_they_could_be_written(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tisdpo_cli.engine.training.float_pairs._BLOCK", 7)
    known, writer = pairs_of_values(40), FloatWriter()

    def write() -> None:
        for both in known:
            for side in both:
                writer.append(side)

    if limit is None:
        write()
    else:
        with largest_file(limit):
            write()
            writer.values()
    lengths = np.array([[len(side) for side in both] for both in known])
    with largest_file(10**6):
        stored = FloatPairs(writer.values(), lengths)
    for pairs, order in ((stored, 1), (stored.swapped(), -1), (stored.swapped().swapped(), 1)):
        assert len(pairs) == 40
        for i in random.Random(0).sample(range(40), 40):
            assert all(torch.equal(a, b) for a, b in zip(pairs[i], known[i][::order], strict=True))
        assert len(pairs[3:9]) == 6
        with pytest.raises(IndexError):
            pairs[40]


def test_no_values_are_no_values() -> None:
    assert len(FloatPairs(FloatWriter().values(), np.zeros((0, 2), np.int64))) == 0


def test_log_probs_of_passes() -> None:
    writer = FloatWriter()
    for values in ([1.0, 2.0], [3.0], [4.0, 5.0, 6.0]):
        writer.append(torch.tensor(values))
    passes = PassLogps(writer.values(), {(1, 2): 2, (0,): 1, (5, 3): 3})
    assert {some: values.tolist() for some, values in passes.items()} == {
        (1, 2): [1.0, 2.0], (0,): [3.0], (5, 3): [4.0, 5.0, 6.0],
    }  # fmt: skip


def test_only_pairs_that_are_needed_have_a_reference() -> None:
    tokens: list[Any] = [f"pair {i}" for i in range(6)]
    known = pairs_of_values(3)
    pairs = WeightedPairs(tokens, pairs_of_values(6)).with_reference(np.array([0, 3, 5]), known)
    assert [pair.tokens for pair in pairs] == tokens
    assert [pair.reference for pair in pairs] == [known[0], None, None, known[1], None, known[2]]
    assert all(pair.weights is not None for pair in pairs)
    assert [pair.reference for pair in WeightedPairs(tokens)] == [None] * 6


def test_the_kept_rows_end_with_the_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary file is removed when nothing needs it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(row_store.RowStore, "_build", lambda self, key, build: self._build_elsewhere(build))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = run_here("train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0, done.err
    assert list((tmp_path / "temporary").iterdir()) == []
