"""The dry run of the trainings: what it predicts, without loading weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here
from safetensors.torch import load_file


@pytest.fixture
def predicted(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The prediction of a dry run, during which no weights can be loaded, and what was said."""

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("tisdpo_cli.engine.training.policy.load_model", no_weights)
    monkeypatch.setattr("tisdpo_cli.engine.training.reference_model.load_model", no_weights)

    def run(command: str, *more: str) -> tuple[dict[str, Any], str]:
        start = () if "--init" in more else ("-m", world / "sft")
        done = run_here(
            command, *start, "-d", world / "data", "-o", tmp_path / "out", "--dry-run", "--json", "--max-steps", "3",
            "--batch-size", "4", *more,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert not (tmp_path / "out").exists()
        return json.loads(done.out)["prediction"], done.err

    return run


def test_a_dry_run_predicts_memory_disk_and_time_without_weights(predicted, world: Path) -> None:
    found, said = predicted("train-dpo", "--save-every", "1", "--no-ref-cache")
    size = 4 * sum(tensor.numel() for tensor in load_file(world / "sft" / "model.safetensors").values())
    memory = found["memory"]
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] == size
    assert found["disk"] == {"checkpoints": 3 * 2 * size, "model": size}
    assert set(found["flops"]) == set(found["seconds"]) == {"reference", "training", "evaluation"}
    assert all(value > 0 for value in (*found["flops"].values(), *found["seconds"].values()))
    assert (found["fits"], found["change"], found["processes"]) == (True, None, 1)
    assert "a prediction from shapes alone, no weights were read:" in said
    assert "will probably run out" not in said


@pytest.mark.parametrize(
    ("command", "stages"), [("train-sft", {"training", "evaluation"}), ("train-reverse", {"reference", "training"})]
)
def test_every_training_predicts(predicted, command: str, stages: set[str]) -> None:
    off = ("--eval-pairs", "0") if command == "train-reverse" else ()
    assert set(predicted(command, *off)[0]["flops"]) == stages


def test_a_new_model_is_predicted_from_its_shape(predicted) -> None:
    shape = ("--init", "--vocab-size", "320", "--hidden-size", "64", "--layers", "3", "--heads", "4")
    found, _ = predicted("train-sft", *shape)
    ff, width = 192, 64
    layer = 4 * width * width + 3 * width + 3 * width * ff + 2 * width
    assert found["memory"]["weights"] == 4 * (320 * width + 3 * layer + width)


def test_a_reference_that_is_needed_whole_is_predicted(predicted) -> None:
    found, _ = predicted("train-dpo", "--loss", "tdpo2")
    assert found["memory"]["reference"] == found["memory"]["weights"]
    assert "reference" not in found["flops"]


def test_what_does_not_fit_names_the_setting_to_change(predicted, monkeypatch: pytest.MonkeyPatch) -> None:
    total = predicted("train-dpo")[0]["memory_total"]
    monkeypatch.setattr("tisdpo_cli.engine.training.dry_run.resident_memory", lambda: 0)
    monkeypatch.setattr("tisdpo_cli.engine.training.dry_run._CPU_EXTRA", 0)
    small = predicted("train-dpo")[0]["memory_total"]
    assert small < total
    monkeypatch.setattr("tisdpo_cli.engine.training.dry_run.device_memory", lambda _: small - 1)
    monkeypatch.setattr("tisdpo_cli.engine.training.dry_run.free_disk", lambda _: 10)
    found, said = predicted("train-dpo", "--micro-batch-size", "4")
    assert not found["fits"]
    assert found["change"]["total"] < small
    assert "will probably run out of memory: " in said
    assert "lower --micro-batch-size (now 4) to 2" in said
    assert "will probably run out of disk: " in said
