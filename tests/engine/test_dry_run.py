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
    monkeypatch.setattr("tisdpo_cli.engine.dry_run.resident_memory", lambda: 0)
    monkeypatch.setattr("tisdpo_cli.engine.dry_run._CPU_EXTRA", 0)
    small = predicted("train-dpo")[0]["memory_total"]
    assert small < total
    monkeypatch.setattr("tisdpo_cli.engine.dry_run.device_memory", lambda _: small - 1)
    monkeypatch.setattr("tisdpo_cli.engine.training.dry_run.free_disk", lambda _: 10)
    found, said = predicted("train-dpo", "--micro-batch-size", "4")
    assert not found["fits"]
    assert found["change"]["total"] < small
    assert "will probably run out of memory: " in said
    assert "lower --micro-batch-size (now 4) to 2" in said
    assert "will probably run out of disk: " in said


# ---------------------------------------------------------------- every command that computes

COMMANDS = {
    "train-sft": ("-m", "{w}/sft"),
    "train-dpo": ("-m", "{w}/sft"),
    "train": ("-m", "{w}/sft", "-d", "{w}/scored"),
    "estimate": ("--forward", "{w}/dpo", "--reverse", "{w}/reverse"),
    "evaluate": ("-m", "{w}/dpo", "--ref-model", "{w}/sft", "--sample-prompts", "2", "--samples", "{t}/samples.jsonl"),
}


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """Everything in some folders, with the size and the time it was written."""
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for folder in folders
        for path in (folder, *sorted(folder.rglob("*")))
    }


def dry(command: str, contrast: Path, tmp_path: Path, *more: str) -> tuple[dict[str, Any], str]:
    """A dry run of a command, which writes nothing: its object, and what was said."""
    given = [part.format(w=contrast, t=tmp_path) for part in COMMANDS[command]]
    data = () if "-d" in given else ("-d", contrast / "data")
    out = () if command == "evaluate" else ("-o", tmp_path / "out")
    before = listing(contrast, tmp_path)
    done = run_here(command, *given, *data, *out, "--dry-run", "--json", *more)
    assert done.code == 0, done.err
    assert listing(contrast, tmp_path) == before
    return json.loads(done.out), done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_computes_says_in_one_object_what_it_would_do(
    contrast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    for module in ("training.policy", "training.reference_model"):
        monkeypatch.setattr(f"tisdpo_cli.engine.{module}.load_model", no_weights)
    monkeypatch.setattr("tisdpo_cli.model.shared_models.load_model", no_weights)
    # As if the models were large.
    monkeypatch.setattr("tisdpo_cli.engine.scoring.prediction._SOON_LOADED", 0)
    found, said = dry(command, contrast, tmp_path)
    assert (found["dry_run"], found["command"]) == (True, command)
    assert found["columns"] == {name: name for name in ("prompt", "chosen", "rejected")}
    assert found["settings"]["data"]["max_length"] == 512
    for sizes in found["splits"].values():
        for lengths in (sizes["prompt_tokens"], sizes["response_tokens"]):
            assert 0 < lengths["median"] <= lengths["p95"] <= lengths["max"]
        assert sizes["truncated_responses"] == 0
    assert found["first_row"]["prompt"]
    assert found["prediction"]["memory_total"] > 0
    assert all(value > 0 for value in found["prediction"]["seconds"].values())
    assert bool(found["steps"]) == command.startswith("train")
    assert found["prediction"]["timed_by"] == "matrix products"
    assert "a prediction from shapes alone, no weights were read:" in said
    assert "nothing was " in said
    assert "columns: prompt = 'prompt'" in said


def test_a_dry_run_of_train_shows_the_weights_of_a_pair(contrast: Path, tmp_path: Path) -> None:
    found, said = dry("train", contrast, tmp_path, "--transform", "rank_based")
    response = found["first_row"]["responses"][0]
    weights = [token["weight"] for token in response["tokens"]]
    assert (min(weights), max(weights)) == pytest.approx((0.7, 1.3))
    assert f"{response['tokens'][0]['text']!r}{{{weights[0]:.2f}}}" in said
    unweighted, said = dry("train-dpo", contrast, tmp_path)
    assert {token["weight"] for token in unweighted["first_row"]["responses"][0]["tokens"]} == {None}
    assert "in braces" not in said


def test_a_dry_run_counts_what_is_truncated(contrast: Path, tmp_path: Path) -> None:
    found, _ = dry("estimate", contrast, tmp_path, "--max-length", "30", "--max-prompt-length", "20")
    sizes = found["splits"]["train"]
    assert sizes["truncated_responses"] > 0
    assert found["settings"]["data"]["max_length"] == 30


def test_the_sides_of_an_estimation_cost_what_they_compute(contrast: Path, tmp_path: Path) -> None:
    found, _ = dry("estimate", contrast, tmp_path)
    flops, memory = found["prediction"]["flops"], found["prediction"]["memory"]
    assert flops["forward"] == flops["reverse"] > 0
    size = 4 * sum(tensor.numel() for tensor in load_file(contrast / "sft" / "model.safetensors").values())
    assert memory["weights"] == 2 * size
    alone, _ = dry("estimate", contrast, tmp_path, "--sequential")
    assert alone["prediction"]["memory"]["weights"] == size


def test_a_small_model_is_timed_by_a_pass(contrast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tisdpo_cli.engine.scoring.scorer.PartScorer.seconds_of_pass", lambda *_: 2.0)
    found, said = dry("estimate", contrast, tmp_path, "--batch-size", "8")
    prediction = found["prediction"]
    assert prediction["timed_by"] == "forward pass"
    assert "a prediction from shapes, and the time from a measured forward pass:" in said
    # 32 pairs of similar lengths in batches of 8, of which one takes 2 seconds.
    assert prediction["seconds"]["forward"] == pytest.approx(4 * 2.0, rel=0.4)


def test_without_samples_an_evaluation_only_reads_pairs(contrast: Path, tmp_path: Path) -> None:
    found, _ = dry("evaluate", contrast, tmp_path)
    assert set(found["prediction"]["seconds"]) == {"pairs", "samples"}
    assert found["prediction"]["disk"]["samples"] > 0
    done = run_here(
        "evaluate", "-m", contrast / "dpo", "--ref-model", contrast / "sft", "-d", contrast / "data",
        "--sample-prompts", "0", "--dry-run", "--json",
    )  # fmt: skip
    assert set(json.loads(done.out)["prediction"]["seconds"]) == {"pairs"}


def test_a_dry_run_of_merge_knows_the_size_of_the_model(world: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    made = run_here(
        "train-dpo", "-m", world / "sft", "-d", world / "data", "-o", adapter, "--max-steps", "1", "--batch-size", "4",
        "--lora-r", "2",
    )  # fmt: skip
    assert made.code == 0, made.err
    before = listing(tmp_path)
    done = run_here("merge", adapter, "-o", tmp_path / "merged", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert listing(tmp_path) == before
    size = 4 * sum(tensor.numel() for tensor in load_file(world / "sft" / "model.safetensors").values())
    prediction = json.loads(done.out)["prediction"]
    assert prediction["disk"] == {"model": size}
    assert prediction["memory"]["weights"] > size
    assert prediction["seconds"]["reading"] > 0
