"""Every objective through the program: it trains, resumes to the same bytes, and is told apart."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Done, Listener, read_jsonl, run_here, write_jsonl

import tisdpo_cli
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.settings.train_pairs import TrainDpo

SHORT = ("--batch-size", "8", "--lr", "1e-3", "--warmup-steps", "0")
LOSSES = [
    ("dpo", "--alpha", "1"),
    ("dpo", "--label-smoothing", "0.1"),
    ("dpo", "--reference-free"),
    ("ipo",),
    ("ipo", "--length-normalize"),
    ("tdpo1",),
    ("tdpo2", "--alpha", "0.3"),
]


def train(command: str, world: Path, output: Path, *arguments: str, data: Path | None = None) -> Done:
    return run_here(command, "-m", world / "sft", "-d", data or world / "data", "-o", output, *SHORT, *arguments)


def model_bytes(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("loss", LOSSES, ids=" ".join)
def test_every_objective_learns(world: Path, tmp_path: Path, loss) -> None:
    done = train("train-dpo", world, tmp_path / "o", "--max-steps", "10", "--loss", *loss)
    assert done.code == 0, done.err
    metrics = read_jsonl(tmp_path / "o" / "metrics.jsonl")
    assert metrics[-1]["eval/rewards/accuracies"] > 0.9
    assert metrics[-1]["eval/loss"] < metrics[0]["eval/loss"]
    assert f"loss = {loss[0]} (β 0.1" in done.err
    start = {"ipo": 25.0}.get(loss[0], math.log(2))
    if "--reference-free" in loss:
        assert "the loss does not use the reference" in done.err
    else:
        assert metrics[0]["loss"] == pytest.approx(start, abs=1e-4)
        assert "as expected" in done.err
    assert metrics[0]["rewards/margins"] == 0
    has_kl = "alpha" in " ".join(loss) or loss[0].startswith("tdpo")
    assert ("kl/chosen" in metrics[-1]) == ("eval/kl/margins" in metrics[-1]) == has_kl
    if has_kl:
        assert (metrics[0]["kl/chosen"], metrics[0]["kl/rejected"]) == (0, 0)
        assert metrics[-1]["kl/chosen"] > 0


@pytest.mark.parametrize("loss", [("dpo", "--alpha", "0.5"), ("ipo",)], ids=" ".join)
def test_token_weights_go_with_it(contrast: Path, tmp_path: Path, loss) -> None:
    done = train("train", contrast, tmp_path / "o", "--max-steps", "6", "--loss", *loss, data=contrast / "scored")
    assert done.code == 0, done.err
    last = read_jsonl(tmp_path / "o" / "metrics.jsonl")[-1]
    assert last["weighted_rewards/margins"] != last["rewards/margins"]


def test_tdpo_takes_no_token_weights(contrast: Path, tmp_path: Path) -> None:
    done = train("train", contrast, tmp_path / "o", "--loss", "tdpo1", data=contrast / "scored")
    assert done.code == 2
    assert "takes no token weights" in done.error


def test_reverse_is_forward_on_swapped_pairs(world: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = read_jsonl(world / "data" / f"{split}.jsonl")
        swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", swapped)
    arguments = ("--loss", "tdpo2", "--max-steps", "3")
    assert train("train-reverse", world, tmp_path / "a", *arguments).code == 0
    assert train("train-dpo", world, tmp_path / "b", *arguments, data=tmp_path / "data").code == 0
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")


@pytest.mark.parametrize("method", [{"alpha": 0.5}, {"loss": "tdpo2"}], ids=str)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(world: Path, tmp_path: Path, method) -> None:
    def settings(name: str) -> TrainDpo:
        given = {
            "model": str(world / "sft"), "dataset": str(world / "data"), "output_dir": str(tmp_path / name),
            "method": method, "optim": {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0},
        }  # fmt: skip
        return TrainDpo(value_layers=[given])

    train_pairs(settings("whole"), Listener())
    with pytest.raises(Interrupted):
        train_pairs(settings("stopped"), Listener(stop_after=3))
    train_pairs(settings("stopped"), Listener())
    assert model_bytes(tmp_path / "whole") == model_bytes(tmp_path / "stopped")


def test_gradient_checkpointing_and_smaller_passes_change_only_rounding(world: Path, tmp_path: Path) -> None:
    losses = []
    for name, more in (("a", ()), ("b", ("--gradient-checkpointing",)), ("c", ("--micro-batch-size", "3"))):
        done = train("train-dpo", world, tmp_path / name, "--max-steps", "3", "--alpha", "1", *more)
        assert done.code == 0, done.err
        losses.append([m["loss"] for m in read_jsonl(tmp_path / name / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_bf16_compares_distributions_too(world: Path, tmp_path: Path) -> None:
    done = train("train-dpo", world, tmp_path / "o", "--max-steps", "2", "--loss", "tdpo1", "--dtype", "bf16")
    assert done.code == 0, done.err
    metrics = read_jsonl(tmp_path / "o" / "metrics.jsonl")
    assert metrics[0]["kl/chosen"] == 0
    assert metrics[2]["kl/chosen"] > 0


def test_a_default_that_is_given_is_the_same_output(contrast: Path, tmp_path: Path) -> None:
    for command, data, given in (
        ("train-dpo", contrast / "data", ("--alpha", "0")),
        ("train", contrast / "scored", ("--transform", "exp", "--mu", "1")),
    ):
        assert train(command, contrast, tmp_path / command, "--max-steps", "1", data=data).code == 0
        done = train(command, contrast, tmp_path / command, "--max-steps", "1", *given, data=data)
        assert (done.code, "nothing to do" in done.err) == (0, True), done.err
        done = train(command, contrast, tmp_path / command, "--max-steps", "1", "--alpha", "0.5", data=data)
        assert done.code == 2
        assert "method.alpha 0 → 0.5;" in done.error
    sides = ("-m", contrast / "sft", "-d", contrast / "data", "-o", tmp_path / "scored")
    assert run_here("estimate", *sides).code == 0
    assert "nothing to do" in run_here("estimate", *sides, "--positive-template", "harmless").err


def test_another_objective_is_another_output(world: Path, tmp_path: Path) -> None:
    assert train("train-dpo", world, tmp_path / "o", "--max-steps", "1").code == 0
    done = train("train-dpo", world, tmp_path / "o", "--max-steps", "1", "--loss", "ipo")
    assert done.code == 2
    assert "method.loss dpo → ipo" in done.error


# ---------------------------------------------------------------- a new one

HINGE = """
from tisdpo_cli.method.objectives import OBJECTIVES, Objective
from tisdpo_cli.method.params import Param


def hinge(chosen, rejected, beta, p):
    return (p["margin"] - beta * (chosen.log_ratios - rejected.log_ratios)).clamp(min=0)


params = {"margin": Param(1.0, "least of β u", above=0.0)}
OBJECTIVES["hinge"] = Objective(hinge, "max(0, margin − β u)", params, start="margin")
from tisdpo_cli.cli.app import main

main()
"""


def test_a_new_objective_is_one_entry(contrast: Path, tmp_path: Path) -> None:
    """With it come its option, help, bounds, record, token weights, and the check before the first update."""
    program = tmp_path / "program.py"
    program.write_text(HINGE)
    env = {**os.environ, "PYTHONPATH": str(Path(tisdpo_cli.__file__).parents[1]), "COLUMNS": "120"}

    def hinge(*arguments: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, program, *arguments], capture_output=True, text=True, env=env, check=False, timeout=120
        )

    assert "least of β u (hinge; default: 1)" in " ".join(hinge("train-dpo", "--help").stdout.replace("│", " ").split())
    given = ["train", "-m", contrast / "sft", "-d", contrast / "scored", "-o", tmp_path / "o", *SHORT]
    given += ["--max-steps", "3", "--loss", "hinge"]
    bad = hinge(*given, "--margin", "0")
    assert bad.returncode == 2
    assert "margin of loss hinge must be above 0, not 0" in bad.stderr
    done = hinge(*given, "--margin", "2")
    assert done.returncode == 0, done.stderr
    assert "loss = hinge (β 0.1, margin 2): max(0, margin − β u)" in done.stderr
    assert "step-0 loss 2.0000 = margin as expected" in done.stderr
    losses = [row["loss"] for row in read_jsonl(tmp_path / "o" / "metrics.jsonl")]
    assert losses[-1] < losses[0] == pytest.approx(2)
    assert json.loads((tmp_path / "o" / "run.json").read_text())["made_from"]["method.margin"] == 2
