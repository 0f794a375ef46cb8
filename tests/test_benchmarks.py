"""The benchmarks run, compare the same work, and print one object of what they measured. Not how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def ran(script: str, *arguments: str) -> dict[str, Any]:
    """The JSON object of a benchmark with few pairs, once."""
    command = [sys.executable, str(BENCHMARKS / script), "--json", "--rounds", "1", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.benchmark
def test_training_is_compared_with_the_same_training() -> None:
    found = ran("train_vs_trl.py", "--pairs", "9")
    ours, *theirs = found["losses"].values()
    assert len(ours) == 2
    assert len(theirs) >= 2
    for losses in theirs:
        # TRL rounds what it logs.
        assert losses == pytest.approx(ours, abs=1e-4)
    runs = {name: of_name[0] for name, of_name in found["runs"].items()}
    against = runs[found["against"]]
    assert found["speed_ratio"] == pytest.approx(against["seconds"] / runs["tisdpo"]["seconds"])
    assert found["memory_ratio"] == pytest.approx(runs["tisdpo"]["peak_mib"] / against["peak_mib"])
    assert all(0 < record["utilisation"] < 1 for record in runs.values())
    # The same useful work on all sides.
    assert len({record["work"] for record in runs.values()}) == 1


@pytest.mark.benchmark
def test_estimation_is_compared_with_the_same_scores() -> None:
    found = ran("estimate.py", "--pairs", "5")
    assert found["largest_difference"] < 1e-4
    assert found["speed_ratio"] > 0
    assert set(found["runs"]) == {"tisdpo", "dense"}


@pytest.mark.benchmark
def test_large_data_are_read_once() -> None:
    found = ran("large_data.py", "--counts", "20", "60", "--processes", "1")
    (few,), (more,) = found["runs"].values()
    assert few["tokenizing"]["1"]["tokens_per_second"] > 0
    assert more["file_mib"] > 2 * few["file_mib"]
    for record in (few, more):
        assert record["cache_mib"] > record["file_mib"]
        assert all(record[start]["peak_mib"] > 0 for start in ("first start", "second start", "to the first update"))


@pytest.mark.benchmark
@pytest.mark.parametrize("more", [(), ("--optimizer", "adamw"), ("--lora-r", "8"), ("--gradient-checkpointing",)])
def test_memory_is_about_what_a_dry_run_predicts(more: tuple[str, ...]) -> None:
    found = ran("predicted_memory.py", *more)
    for record in found["shapes"].values():
        assert record["predicted_mib"] == pytest.approx(record["peak_mib"], rel=0.25)


@pytest.mark.benchmark
def test_a_sharded_model_is_the_same_with_less_memory_on_each_process() -> None:
    found = ran("sharded_memory.py", "--shape", "small")
    whole, sharded = found["whole"], found["sharded"]
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for way in (whole, sharded):
        assert len(way["peak_mib"]) == 2
        assert min(way["peak_mib"]) > max(way["start_mib"])
