"""bf16: the reference shares the forward passes of the policy, and scores stay in float32 unless asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Done, Listener, run_here

from tisdpo_cli.engine import estimate
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.outputs import read_metrics
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

SHORT = ("--warmup-steps", "0", "--dtype", "bf16", "--no-ref-cache", "--eval-pairs", "8", "--lr", "1e-3")
STARTS = {"dpo": math.log(2), "ipo": 25.0, "tdpo1": math.log(2), "tdpo2": math.log(2)}
OBJECTIVES = [
    ("dpo",),
    ("dpo", "--alpha", "0.5"),
    ("dpo", "--label-smoothing", "0.1"),
    ("ipo",),
    ("tdpo1",),
    ("tdpo2",),
]


def train(world: Path, out: Path, command: str, *more: str) -> Done:
    """A short training in bf16 that must succeed."""
    data = world / ("scored" if command == "train" else "data")
    done = run_here(command, "-m", world / "sft", "-d", data, "-o", out, *SHORT, *more)
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize("size", ["1", "3", "8"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=" ".join)
def test_step_0_is_exact_whatever_the_passes(
    contrast: Path, tmp_path: Path, objective: tuple[str, ...], size: str
) -> None:
    options = ("--max-steps", "1", "--batch-size", "8", "--micro-batch-size", size, "--loss", *objective)
    done = train(contrast, tmp_path / "out", "train-dpo", *options)
    first = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(STARTS[objective[0]], rel=1e-7)
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/accuracies"] == 0
    assert first["eval/rewards/margins"] == 0
    assert "as expected" in done.err


@pytest.mark.parametrize("command", ["train-reverse", "train"])
@pytest.mark.parametrize("more", [(), ("--gradient-checkpointing",), ("--layout", "separate")], ids=str)
def test_every_training_starts_at_its_reference(
    contrast: Path, tmp_path: Path, command: str, more: tuple[str, ...]
) -> None:
    train(contrast, tmp_path / "out", command, "--max-steps", "1", "--batch-size", "8", *more)
    first = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-7)
    assert first["rewards/margins"] == 0


def test_the_second_epoch_has_passes_and_a_reference_of_its_own(contrast: Path, tmp_path: Path) -> None:
    """With a learning rate that moves nothing, every pass of every epoch agrees with its reference to the bit."""
    options = ("--epochs", "3", "--batch-size", "5", "--optimizer", "sgd", "--lr", "1e-30")
    train(contrast, tmp_path / "out", "train-dpo", *options)
    metrics = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert len(metrics) == 16
    assert {line["rewards/margins"] for line in metrics} == {0.0}


def test_a_second_run_reads_the_reference_of_its_passes_from_the_cache(contrast: Path, tmp_path: Path) -> None:
    options = [option for option in SHORT if option != "--no-ref-cache"]
    options += ["--max-steps", "2", "--batch-size", "8", "--cache-dir", str(tmp_path / "cache")]
    runs = [
        run_here("train-dpo", "-m", contrast / "sft", "-d", contrast / "data", "-o", tmp_path / name, *options)
        for name in ("one", "two")
    ]
    assert [done.code for done in runs] == [0, 0]
    assert "read from the cache" not in runs[0].err
    assert "reference log-probs of 16 pairs read from the cache" in runs[1].err
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert models[0] == models[1]


class OnGpu(Runtime):
    """This process, as it would be on a GPU."""

    def __init__(self) -> None:
        self.device, self.reporter = torch.device("cuda"), Silent()


@pytest.mark.parametrize("capable", [True, False])
def test_scores_are_in_float32_on_every_device_unless_asked_for(monkeypatch: pytest.MonkeyPatch, capable: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capable)
    assert OnGpu().precision("auto", scoring=True) == "float32"
    assert OnGpu().precision("auto") == ("bf16" if capable else "float32")
    assert Runtime(Silent()).precision("auto", scoring=True) == "float32"


def test_scores_in_bf16_come_with_their_agreement_on_these_rows(contrast: Path, tmp_path: Path) -> None:
    flags = {
        "forward": str(contrast / "dpo"), "reverse": str(contrast / "reverse"), "dataset": str(contrast / "data"),
        "output_dir": str(tmp_path / "out"), "dtype": "bf16",
    }  # fmt: skip
    listener = Listener()
    estimate(load(COMMANDS["estimate"].settings, flags, environ={}).settings, listener)
    (warning,) = [line for line in listener.warned if "bf16" in line]
    assert "on 8 rows, r correlates with float32 by " in warning
    assert "signs agree" in warning
    assert json.loads((tmp_path / "out" / "estimate.json").read_text())["dtype"] == "bf16"
    # The same models without a difference: no score is left to agree on.
    flags |= {"reverse": flags["forward"], "output_dir": str(tmp_path / "same")}
    listener = Listener()
    estimate(load(COMMANDS["estimate"].settings, flags, environ={}).settings, listener)
    assert any("by undefined and 100%" in line for line in listener.warned)
