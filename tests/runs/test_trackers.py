"""Trackers: what is logged can be read back, a resumed run goes on as the same one, and nothing is asked or sent."""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import accelerate.tracking
import pytest
import torch
from conftest import Listener, read_jsonl, run_here, write_jsonl
from processes import on_ranks

from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.errors import Interrupted, TrainingError, UsageError
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs import trackers
from tisdpo_cli.runs.trackers import TRACKERS, TrackerConfig, check_trackers, start_trackers
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load
from tisdpo_cli.settings.watching import TRACKER_NAMES, Tracking

SHORT = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0, "eval_pairs": 4, "save_every": 2}
tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")


def train(world: Path, out: Path, listener: Silent | None = None, **settings: Any) -> None:
    given = {"model": world / "sft", "dataset": world / "data", "output_dir": out, **SHORT, **settings}
    train_pairs(
        load(COMMANDS["train-dpo"].settings, {n: str(v) for n, v in given.items()}).settings, listener or Silent()
    )


def events(out: Path) -> dict[str, dict[int, float]]:
    """What tensorboard shows of a run; no step of a curve may be there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (directory,) = (out / "trackers" / "tensorboard").iterdir()
    read = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    read.Reload()
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for tag in read.Tags()["scalars"]:
        for event in read.Scalars(tag):
            assert event.step not in found[tag], tag
            found[tag][event.step] = event.value
    return found


def assert_shows_every_step(out: Path) -> None:
    rows = read_jsonl(out / "metrics.jsonl")
    expected: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        for name, value in row.items():
            if name != "step":
                expected[name][row["step"]] = value
    found = events(out)
    assert found.keys() == expected.keys()
    for name, curve in expected.items():
        assert found[name] == pytest.approx(curve, rel=1e-6, abs=1e-12), name


@tensorboard
def test_tensorboard_shows_every_metric_of_every_step(world: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "out", report_to="tensorboard", run_name="my run/1")
    assert_shows_every_step(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "trackers" / "tensorboard").iterdir()] == ["my-run-1"]


@tensorboard
def test_a_resumed_run_goes_on_in_the_same_directory_with_no_step_twice(world: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    train(world, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        train(world, out, Listener(5), report_to="tensorboard", run_name="first")
    # As if it had been killed after step 5 and before its checkpoint.
    newest = out / "checkpoints" / "step-00000005"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    listener = Listener()
    train(world, out, listener, report_to="tensorboard", run_name="second")
    assert any("4 of 6 steps done" in said for said in listener.said)
    assert_shows_every_step(out)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@tensorboard
def test_a_run_that_starts_over_forgets_the_one_before(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        train(world, out, Listener(3), report_to="tensorboard", run_name="first")
    train(world, out, report_to="tensorboard", run_name="second", resume="never")
    assert_shows_every_step(out)


# ---------------------------------------------------------------- a tracker that is watched


class Fake(accelerate.tracking.GeneralTracker):
    """Stands for a tracker whose package is not there."""

    name, requires_logging_directory = "wandb", False
    made: ClassVar[list[Fake]] = []
    fails_at: int | None = None

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.logged, self.configured, self.finished = arguments, [], {}, 0
        type(self).made.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        print("a banner on stdout")

    def store_init_configuration(self, values: dict) -> None:
        self.configured = values

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server is gone\nand more")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(trackers, "find_spec", lambda _: True)
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "fails_at", None)
    return Fake


def test_a_tracker_gets_settings_and_steps_and_is_finished(world: Path, tmp_path: Path, fake: type[Fake]) -> None:
    done = run_here(
        "train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", "--max-steps", "2",
        "--report-to", "wandb", "--project", "trials",
    )  # fmt: skip
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
    (made,) = fake.made
    assert (made.arguments["run_name"], made.arguments["name"]) == ("trials", "out")
    assert made.configured["command"] == "train-dpo"
    assert made.configured["method.beta"] == 0.1
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [{"step": step, **values} for step, values in made.logged] == rows
    assert made.finished == 1


def test_a_tracker_that_fails_is_left_with_one_warning(world: Path, tmp_path: Path, fake: type[Fake]) -> None:
    torch.set_num_threads(1)
    train(world, tmp_path / "plain")
    fake.fails_at = 2
    listener = Listener()
    train(world, tmp_path / "out", listener, report_to="wandb")
    warned = [text for text in listener.warned if "--report-to" in text]
    assert warned == [
        "--report-to wandb has failed and is left: the server is gone; metrics.jsonl has every step"
    ]  # fmt: skip
    assert [step for step, _ in fake.made[0].logged] == [0, 1]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()


def test_a_tracker_that_does_not_start_is_an_error_before_training(
    world: Path, tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: Fake) -> None:
        raise RuntimeError("no such project")

    monkeypatch.setattr(fake, "start", start)
    with pytest.raises(TrainingError, match="does not start: no such project"):
        train(world, tmp_path / "out", report_to="wandb")
    assert read_jsonl(tmp_path / "out" / "metrics.jsonl") == []


def test_no_tracker_is_touched_unless_asked_for(world: Path, tmp_path: Path, fake: type[Fake]) -> None:
    train(world, tmp_path / "out")
    assert not fake.made
    assert not (tmp_path / "out" / "trackers").exists()


def rows(*steps: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": 1.0 / (1 + step)} for step in steps]


def test_the_same_run_goes_on(tmp_path: Path, fake: type[Fake]) -> None:
    """Also one that is new, which gets the steps before; a step that was logged after the checkpoint comes once."""
    config = TrackerConfig(["wandb"], "name", "project", tmp_path / "trackers")
    first = start_trackers(config, None, [], pytest.fail)
    for row in rows(0, 1, 2, 3):
        first.log(row)
    first.close()
    both = TrackerConfig(["wandb", "trackio"], "another", "project", tmp_path / "trackers")
    second = start_trackers(both, 2, rows(0, 1, 2, 3), pytest.fail)
    for row in rows(3, 4):
        second.log(row)
    second.close()
    before, again, new = fake.made
    assert before.arguments["id"] == again.arguments["id"]
    assert again.arguments["name"] == "name"
    assert again.arguments["resume"] == "allow"
    assert [step for step, _ in before.logged] == [0, 1, 2, 3]
    assert [step for step, _ in again.logged] == [4]
    assert [step for step, _ in new.logged] == [0, 1, 2, 3, 4]
    assert new.arguments["name"] != again.arguments["name"]


def test_a_run_that_is_killed_again_before_it_has_caught_up(tmp_path: Path, fake: type[Fake]) -> None:
    config = TrackerConfig(["wandb"], "name", "project", tmp_path / "trackers")
    for resume_step, before, now in ((None, (), range(6)), (2, range(6), (3,)), (2, range(4), range(3, 8))):
        running = start_trackers(config, resume_step, rows(*before), pytest.fail)
        for row in rows(*now):
            running.log(row)
    assert [step for made in fake.made for step, _ in made.logged] == list(range(8))


# ---------------------------------------------------------------- what cannot run


def test_what_settings_name_is_what_there_is() -> None:
    assert set(TRACKER_NAMES) == set(TRACKERS)
    assert Tracking().names() == Tracking(report_to="none").names() == Tracking(report_to=[]).names() == ()
    assert Tracking(report_to=["wandb", "tensorboard"]).names() == Tracking(report_to="wandb, tensorboard").names()
    with pytest.raises(ValueError, match="unknown tracker 'all'; use tensorboard, wandb, mlflow, trackio or none"):
        Tracking(report_to="all")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(UsageError) as caught:
        check_trackers([name])
    assert str(caught.value).startswith(f"--report-to {name}: needs the package {name}; pip install ")


def test_wandb_is_refused_where_it_would_ask_for_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: True)
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    logins = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(logins))
    with pytest.raises(UsageError, match="no API key; set WANDB_MODE=offline"):
        check_trackers(["wandb"])
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "k" * 40)):
        with monkeypatch.context() as changed:
            changed.setenv(variable, value)
            check_trackers(["wandb"])
    logins.write_text("machine api.wandb.ai login user password secret\n")
    check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(UsageError):
        check_trackers(["wandb"])


def test_run_checks_the_trackers_of_all_stages_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else name)
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    done = run_here("run", "-d", data, "-o", tmp_path / "out", "--set", "train.report_to=mlflow")
    assert (done.code, done.error) == (2, "error: --report-to mlflow: needs the package mlflow; pip install mlflow")
    assert not (tmp_path / "out").exists()


@tensorboard
@pytest.mark.slow
def test_the_first_process_alone_reports(world: Path, tmp_path: Path) -> None:
    given = {"model": world / "sft", "dataset": world / "data", "output_dir": tmp_path / "out", **SHORT}
    done = on_ranks(2, "train-dpo", **given, report_to="tensorboard")
    assert done.code == 0, done.err
    assert_shows_every_step(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "trackers" / "runs.json").read_text()).keys() == {"tensorboard"}
    assert len(list((tmp_path / "out" / "trackers").rglob("events.*"))) == 2  # scalars, and the settings
