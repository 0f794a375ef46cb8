"""Early stopping and the best evaluation: when a training stops, which model it saves, also when it is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Listener, read_jsonl, write_jsonl
from processes import curve, run_jobs
from safetensors.torch import load_file
from test_resume import assert_same, checkpoints, fault_of, result, stop_after, train
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from tisdpo_cli.engine.training.best import BestConfig, BestEvaluation
from tisdpo_cli.engine.training.pair_task import _KL, _PLAIN, _WEIGHTED
from tisdpo_cli.engine.training.sft_task import SftTask
from tisdpo_cli.settings.watching import EVALUATED, Evaluation

HIGH: dict[str, Any] = {
    "optimizer": "sgd", "learning_rate": 0.2, "max_steps": 9, "eval_pairs": 8, "eval_every": 1, "save_every": 100,
}  # fmt: skip


def observed(config: BestConfig, values: list[float]) -> tuple[BestEvaluation, int]:
    """The best of some evaluations, and how many of them there are until the training stops."""
    best = BestEvaluation(config)
    for step, value in enumerate(values, start=1):
        best.observe(step, {"eval/loss": value})
        if best.stops:
            return best, step
    return best, len(values)


CURVES = [
    [3.0, 2.0, 2.5, 2.4, 2.3, 1.0],
    [1.0, 1.0, 1.0, 1.0],
    [3.0, 2.95, 2.9, 2.85, 2.8, 2.75],
    [1.0, 2.0, 3.0, 0.5, 4.0, 5.0, 6.0],
]


@pytest.mark.parametrize("values", CURVES, ids=str)
@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_it_stops_where_transformers_stops(
    tmp_path: Path, values: list[float], greater: bool, threshold: float
) -> None:
    best, stopped = observed(BestConfig("loss", greater, 2, threshold, True), values)
    arguments = TrainingArguments(
        str(tmp_path), metric_for_best_model="loss", greater_is_better=greater, load_best_model_at_end=True,
        eval_strategy="steps", save_strategy="steps", report_to="none", use_cpu=True,
    )  # fmt: skip
    callback, state, control = EarlyStoppingCallback(2, threshold), TrainerState(), TrainerControl()
    expected = len(values)
    for step, value in enumerate(values, start=1):
        callback.on_evaluate(arguments, state, control, metrics={"eval_loss": value})
        if state.best_metric is None or (value > state.best_metric if greater else value < state.best_metric):
            state.best_metric, state.best_global_step = value, step
        if control.should_training_stop:
            expected = step
            break
    assert stopped == expected
    assert (best.step, best.value) == (state.best_global_step, state.best_metric)


def test_the_state_is_all_there_is() -> None:
    config = BestConfig("loss", False, 3, 0.0, True)
    values = [3.0, 2.0, 2.5, 2.4, 1.9, 2.0, 2.0, 2.0, 2.0]
    for cut in range(len(values)):
        before, again = BestEvaluation(config), BestEvaluation(config)
        for step in range(cut):
            before.observe(step, {"eval/loss": values[step]})
        again.restore(json.loads(json.dumps(before.state())))
        for step in range(cut, len(values)):
            before.observe(step, {"eval/loss": values[step]})
            again.observe(step, {"eval/loss": values[step]})
            assert (before.state(), before.stops) == (again.state(), again.stops)


def eval_losses(out: Path) -> dict[int, float]:
    return {row["step"]: row["eval/loss"] for row in read_jsonl(out / "metrics.jsonl") if "eval/loss" in row}


@pytest.fixture(scope="module")
def mixed(world: Path) -> Path:
    """The world, with a test split of which a quarter contradicts the rest: its loss falls, then rises."""
    rows = read_jsonl(world / "data" / "test.jsonl")
    for row in rows[:2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write_jsonl(world / "mixed" / "test.jsonl", rows)
    shutil.copy(world / "data" / "train.jsonl", world / "mixed")
    HIGH["dataset"] = world / "mixed"
    return world


@pytest.fixture(scope="module")
def stopped(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that is stopped early and saves its best model."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("best") / "out"
    train(mixed, out, load_best=True, early_stopping_patience=2, **HIGH)
    return out


def without_card(out: Path) -> dict[str, bytes]:
    """The files of a model but its card, which tells the settings and evaluations of its own run."""
    return {name: content for name, content in result(out).items() if name != "README.md"}


def test_a_run_stops_and_saves_its_best_model(world: Path, stopped: Path, tmp_path: Path) -> None:
    losses = eval_losses(stopped)
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert max(losses) == best + 2 < HIGH["max_steps"]
    record = json.loads((stopped / "run.json").read_text())
    assert record["best"] == {"step": best, "metric": "eval/loss", "value": losses[best]}
    assert (record["updates"], record["final_metrics"]["step"]) == (best + 2, best)
    # The weights are those of a run that ends there.
    train(world, tmp_path / "short", **{**HIGH, "max_steps": best})
    assert without_card(stopped) == without_card(tmp_path / "short")


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_resuming_changes_nothing(world: Path, stopped: Path, tmp_path: Path, after: int) -> None:
    settings = {"load_best": True, "early_stopping_patience": 2, **HIGH}
    steps = max(eval_losses(stopped))
    if after > steps:
        pytest.skip("stopped before")
    stop_after(world, tmp_path / "out", after, **settings)
    train(world, tmp_path / "out", **settings)
    assert_same(tmp_path / "out", stopped)


def test_the_best_checkpoint_is_kept_and_used_from_another_output(world: Path, stopped: Path, tmp_path: Path) -> None:
    best = json.loads((stopped / "run.json").read_text())["best"]["step"]
    settings = {"load_best": True, **HIGH, "save_every": 1, "keep_checkpoints": 1}
    stop_after(world, tmp_path / "out", best + 3, **settings)
    assert [path.name for path in checkpoints(tmp_path / "out")] == [f"step-{n:08d}" for n in (best, best + 3)]
    newest = checkpoints(tmp_path / "out")[-1]
    train(world, tmp_path / "other", resume=newest, **settings)
    whole = {**settings, "resume": "auto"}
    train(world, tmp_path / "whole", **whole)
    assert without_card(tmp_path / "other") == without_card(tmp_path / "whole")
    # Without it the search begins again, and says so.
    for path in checkpoints(tmp_path / "out")[:1]:
        path.rename(tmp_path / "gone")
    listener = Listener()
    train(world, tmp_path / "third", listener, resume=newest, **settings)
    assert any(f"the checkpoint of step {best}, the best so far, is gone" in warned for warned in listener.warned)


def test_early_stopping_alone_saves_the_last_model(world: Path, stopped: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "out", early_stopping_patience=2, **HIGH)
    assert curve(tmp_path / "out") == curve(stopped)
    ours, best = (load_file(path / "model.safetensors") for path in (tmp_path / "out", stopped))
    assert any(not torch.equal(ours[name], best[name]) for name in ours)


def test_accuracy_is_better_when_it_is_greater(world: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "out", load_best=True, metric_for_best="eval_rewards/accuracies", **HIGH)
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")[1:]
    best = json.loads((tmp_path / "out" / "run.json").read_text())["best"]
    assert best["value"] == max(row["eval/rewards/accuracies"] for row in rows)


def test_what_cannot_be_watched_is_refused(world: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"load_best": True}, "load_best needs evaluations: set eval_every"),
        ({"early_stopping_patience": 1, "eval_every": 1, "eval_pairs": 0}, "early_stopping_patience needs evaluations"),
        ({"metric_for_best": "loss"}, "metric_for_best has no effect without"),
        (
            {"load_best": True, "eval_every": 1, "metric_for_best": "eval_accuracy"},
            "metric_for_best must be one of loss",
        ),
        ({"load_best": True, "eval_every": 1, "early_stopping_threshold": 1.0}, "without early_stopping_patience"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluation(**settings)
    missing = {"load_best": True, "metric_for_best": "kl/margins", **HIGH}
    assert fault_of(world, tmp_path / "out", **missing)[1].startswith(
        "--metric-for-best kl/margins: not evaluated here"
    )
    alone = world / "data" / "train.jsonl"
    code, message = fault_of(world, tmp_path / "out", load_best=True, **{**HIGH, "dataset": alone})
    assert (code, "--load-best: there is no test split to evaluate" in message) == (2, True)


def test_the_settings_know_the_metrics() -> None:
    assert set(EVALUATED) == {*_PLAIN, *_WEIGHTED, *_KL, *SftTask.metrics}
    assert Evaluation().in_force() == Evaluation(load_best=False).in_force()
    given = {"load_best": True, "eval_every": 2}
    assert Evaluation(**given, metric_for_best="eval/loss", greater_is_better=False).in_force() == (
        Evaluation(**given).in_force()
    )
    assert Evaluation(**given, metric_for_best="rewards/margins").greater()
    assert not Evaluation(**given, metric_for_best="kl/chosen").greater()


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_several_processes_agree(world: Path, tmp_path: Path, shard: str) -> None:
    """The loss falls: taken the wrong way round, its first evaluation is the best."""
    given = {"model": world / "sft", "dataset": world / "data", "output_dir": tmp_path / "out", "batch_size": 8}
    steps = {"warmup_steps": 0, "optimizer": "sgd", "learning_rate": 0.05, "eval_every": 1, "shard": shard}
    watch = {"load_best": True, "early_stopping_patience": 2, "greater_is_better": "true"}
    run_jobs(2, [("train-dpo", {**given, **steps, **watch, "max_steps": 9})], tmp_path)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["best"]["step"], record["updates"]) == (1, 3)
    train(world, tmp_path / "one", **{**steps, "shard": "none", "max_steps": 1, "eval_pairs": 8})
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "one"))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-6
