"""`--num-processes`: one line on stdout, one error, the exit code of the command, and nothing left behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conftest import Done, run_here, run_tisdpo
from processes import curve

from tisdpo_cli.errors import Interrupted, TisdpoError, TrainingError, UsageError
from tisdpo_cli.runs import launch as launching
from tisdpo_cli.runs.launch import Processes, launch
from tisdpo_cli.runs.worker import worker_environment
from tisdpo_cli.settings.base import leaf_paths
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

COMPUTING = {"train-sft", "train-dpo", "train-reverse", "estimate", "train", "evaluate", "run"}
SHORT = ("--batch-size", "8", "--micro-batch-size", "4", "--lr", "1e-3", "--warmup-steps", "0")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


# Before anything starts --------------------------------------------------------------------------------------------


def test_every_command_that_computes_has_the_option() -> None:
    assert {name for name, spec in COMMANDS.items() if "num_processes" in leaf_paths(spec.settings)} == COMPUTING


def test_the_number_of_processes_is_no_part_of_what_is_made() -> None:
    given = {"model": "m", "dataset": "d", "output_dir": "o"}
    one, two = (load(COMMANDS["train-dpo"].settings, {**given, "num_processes": n}).settings for n in ("1", "2"))
    assert (one.num_processes, two.num_processes) == (1, 2)
    assert one.fingerprint() == two.fingerprint()


def test_stages_of_the_pipeline_start_no_processes_of_their_own() -> None:
    given = {"model": "m", "dataset": "d", "output_dir": "o", "num_processes": "4"}
    settings = load(COMMANDS["run"].settings, given).settings
    assert settings.num_processes == 4
    assert {stage.num_processes for stage in settings.stages().values()} == {1}
    with pytest.raises(UsageError, match="is set by run"):
        load(COMMANDS["run"].settings, given, sets=["train.num_processes=2"])


def evaluation(world: Path, *more: str) -> Done:
    options = ("-m", world / "sft", "--ref-model", world / "sft", "-d", world / "data", "--sample-prompts", "0")
    return run_here("evaluate", *options, *more)


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "true"])
def test_a_number_that_cannot_be_is_refused(world: Path, number: str) -> None:
    assert evaluation(world, "--num-processes", number).code == 2


def test_beside_a_launcher_it_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    done = evaluation(world, "--num-processes", "2")
    assert (done.code, done.out) == (2, "")
    assert done.error == (
        "error: --num-processes 2: a launcher has already started this process (WORLD_SIZE is set); use one of the two"
    )


def test_more_processes_than_gpus_are_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    done = evaluation(world, "--num-processes", "4")
    assert (done.code, done.out) == (2, "")
    assert "error: --num-processes 4: this machine has 3 GPUs; use at most 3" in done.error


def test_one_process_is_no_launch(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(launching, "launch", refuse)
    done = evaluation(world, "--num-processes", "1")
    assert done.code == 0, done.err


def test_what_is_wrong_shows_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(launching, "launch", refuse)
    for more, message in (
        (["-m", "no/such/model", "-d", "x.jsonl"], "no such"),
        (["-m", "m", "-d", "d", "--beta", "-1"], "--beta"),
    ):
        done = run_here("train-dpo", *more, "-o", tmp_path / "out", "--num-processes", "2")
        assert (done.code, message in done.error) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(Processes, "run", lambda self: started.append(self._environment))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(7)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    launch(2, ["env"])
    launch(16, ["env"])
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    launch(2, ["env"])
    assert [variables["OMP_NUM_THREADS"] for variables in started] == ["3", "1", "5"]
    assert {variables["ACCELERATE_USE_CPU"] for variables in started} == {"1"}


# Processes that are no trainings -----------------------------------------------------------------------------------

START = """
import os, signal, sys, time
from tisdpo_cli.errors import Interrupted, PeerEnded, TrainingError
from tisdpo_cli.runs.worker import leave_error
first = os.environ["RANK"] == "0"
def fail(error, seconds=0):
    time.sleep(seconds)
    leave_error(error)
    os._exit(error.exit_code)
"""


def run_both(tmp_path: Path, script: str) -> None:
    command = [sys.executable, "-c", START + script]
    Processes(2, command, worker_environment(tmp_path), tmp_path).run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "kind", "code", "message"),
    [
        (
            "if not first: os.kill(os.getpid(), 9)\nfail(PeerEnded(), 0.2)",
            TrainingError,
            1,
            "process 2 of 2 was killed by",
        ),
        (
            "if first: os.kill(os.getpid(), 11)\ntime.sleep(60)",
            TrainingError,
            1,
            "1 of 2 was killed by SIGSEGV",
        ),
        ("fail(PeerEnded() if first else TrainingError('own'))", TisdpoError, 1, "^own$"),
        ("if first: fail(TrainingError('own'), 0.3)\nfail(PeerEnded())", TisdpoError, 1, "^own$"),
        ("if first: os._exit(7)\nfail(PeerEnded(), 0.3)", TrainingError, 1, "process 1 of 2 ended with exit code 7"),
        ("fail(Interrupted(15, 'by the system'))", Interrupted, 143, "by the system"),
    ],
    ids=["killed", "crashed", "fails", "fails late", "exits", "interrupted"],
)
def test_the_error_is_that_of_the_process_at_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: type, code: int, message: str
) -> None:
    monkeypatch.setattr(launching, "_FAILED_SECONDS", 0.5)
    with pytest.raises(kind, match=message) as caught:
        run_both(tmp_path, script)
    assert caught.value.exit_code == code


@pytest.mark.slow
def test_success_is_silent(tmp_path: Path) -> None:
    run_both(tmp_path, "")


@pytest.mark.slow
def test_one_that_ignores_the_end_of_the_others_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_FAILED_SECONDS", 0.2)
    monkeypatch.setattr(launching, "_ENDING_SECONDS", 0.8)
    with pytest.raises(TisdpoError, match="own"):
        run_both(
            tmp_path, "signal.signal(15, signal.SIG_IGN)\nif first: fail(TrainingError('own'), 0.3)\ntime.sleep(60)"
        )


# The program -------------------------------------------------------------------------------------------------------


def same_output(one: Path, two: Path) -> bool:
    names = ["model.safetensors"] if (one / "model.safetensors").is_file() else ["train.jsonl", "test.jsonl"]
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def start(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "tisdpo_cli", *map(str, arguments), "--num-processes", "2"]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )


def wait_for(process: subprocess.Popen[str], done: Callable[[], bool]) -> None:
    while not done():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def lines_of(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def training(world: Path, out: Path, steps: int = 6) -> list[str | Path]:
    return ["train-dpo", "-m", world / "sft", "-d", world / "data", "-o", out, *SHORT, "--max-steps", str(steps)]


@pytest.mark.slow
def test_two_processes_are_one_to_the_byte_and_say_so_once(world: Path, tmp_path: Path) -> None:
    done = run_tisdpo(*training(world, tmp_path / "two"), "--num-processes", "2")
    assert (done.code, done.out) == (0, f"{tmp_path / 'two'}\n"), done.err
    assert "on each of 2 processes" in done.err
    assert len(done.err.splitlines()) == len(set(done.err.splitlines())), "a line was said twice"
    assert not [line for line in done.err.splitlines() if "torch" in line or "OMP" in line]
    # Finished is finished, on any number of processes.
    done = run_here(*training(world, tmp_path / "two"))
    assert (done.code, done.out) == (0, f"{tmp_path / 'two'}\n")
    assert "already finished" in done.err
    assert run_here(*training(world, tmp_path / "one")).code == 0
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    assert same_output(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_an_error_is_one_line_with_its_exit_code(world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    done = run_tisdpo(*training(world, tmp_path / "out"), "--num-processes", "2")
    assert (done.code, done.out) == (2, "")
    assert done.error.startswith(f"error: --output-dir {tmp_path / 'out'}: not empty and not created by tisdpo")
    assert done.err.count("error:") == 1
    assert "Traceback" not in done.err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_in_a_checkpoint_and_its_exit_code(world: Path, tmp_path: Path, number: signal.Signals) -> None:
    line = training(world, tmp_path / "two", 40)
    process = start(*line)
    wait_for(process, lambda: lines_of(tmp_path / "two" / "metrics.jsonl") >= 8)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, ""), err
    *_, before, last = err.splitlines()
    assert last.startswith("error: interrupted after step "), err
    assert before.startswith("resume with: tisdpo "), err
    assert err.count("error:") == 1
    assert list((tmp_path / "two" / "checkpoints").glob("step-*"))
    done = run_tisdpo(*shlex.split(before.removeprefix("resume with: tisdpo ")))
    assert (done.code, "resuming from" in done.err) == (0, True), done.err
    assert run_here(*training(world, tmp_path / "one", 40)).code == 0
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    assert same_output(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_signal_before_the_training_ends_all(world: Path, tmp_path: Path) -> None:
    process = start(*training(world, tmp_path / "out"))
    wait_for(process, lambda: len(psutil.Process(process.pid).children()) == 2)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, ""), err
    *_, before, last = err.splitlines()
    assert (last.startswith("error: interrupted"), before.startswith("resume with: ")) == (True, True), err
    assert not [worker for worker in workers if worker.is_running()]


@pytest.mark.slow
def test_processes_do_not_outlive_the_one_that_launched_them(world: Path, tmp_path: Path) -> None:
    process = start(*training(world, tmp_path / "out", 2000))
    wait_for(process, lambda: lines_of(tmp_path / "out" / "metrics.jsonl") >= 4)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=60)
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert list((tmp_path / "out" / "checkpoints").glob("step-*"))


# Put on the path of a process, it kills the second one when a function is called for the nth time.
KILLED = """
import os, signal
if os.environ.get("RANK") == "1":
    import {module} as module
    original, calls = module.{name}, []
    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    module.{name} = killed
"""
MOMENTS = {
    "train-dpo": ("torch.nn.utils", "clip_grad_norm_", 4),
    "estimate": ("safetensors.torch", "save_file", 2),
    "evaluate": ("torch", "searchsorted", 5),
}


def one_that_is_killed(tmp_path: Path, command: str) -> dict[str, str]:
    """Variables with which the second process of a command is killed in the middle of its work."""
    module, name, number = MOMENTS[command]
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(KILLED.format(module=module, name=name, number=number))
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(launching.__file__).parents[2])])}


def work_of(contrast: Path, command: str, out: Path) -> list[str | Path]:
    if command == "train-dpo":
        return [*training(contrast, out), "--save-every", "2"]
    if command == "estimate":
        models = ("--forward", contrast / "dpo", "--reverse", contrast / "reverse")
        return [command, *models, "-d", contrast / "data", "-o", out, "--batch-size", "1"]
    models = ("-m", contrast / "dpo", "--ref-model", contrast / "sft")
    small = ("--batch-size", "2", "--max-new-tokens", "8", "--samples", out)
    return [command, *models, "-d", contrast / "data", *small, "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("command", MOMENTS)
def test_when_one_is_killed_the_same_command_ends_in_the_same_bytes(
    contrast: Path, tmp_path: Path, command: str
) -> None:
    line = work_of(contrast, command, tmp_path / "two")
    began = time.monotonic()
    done = run_tisdpo(*line, "--num-processes", "2", env=one_that_is_killed(tmp_path, command), timeout=60)
    assert (done.code, done.out) == (1, ""), done.err
    assert done.error == (
        "error: process 2 of 2 was killed by SIGKILL, perhaps because memory ran out; rerun the same command to resume"
    )
    assert done.err.count("error:") == 1
    assert time.monotonic() - began < 60
    again = run_tisdpo(*line, "--num-processes", "2")
    assert again.code == 0, again.err
    one = run_here(*work_of(contrast, command, tmp_path / "one"))
    assert one.code == 0, one.err
    if command == "evaluate":
        assert again.out == one.out
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    else:
        assert "resuming" in again.err
        assert same_output(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-dpo", "evaluate"])
def test_under_torchrun_the_survivor_says_that_another_has_ended(contrast: Path, tmp_path: Path, command: str) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tisdpo_cli"]
    env = {**os.environ, **one_that_is_killed(tmp_path, command), "ACCELERATE_USE_CPU": "1"}
    # The launcher waits long enough for the survivor to notice by itself.
    done = subprocess.run(
        [*line, *map(str, work_of(contrast, command, tmp_path / "two"))],
        capture_output=True, text=True, env=env, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    errors = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "another process of this run has ended" in errors[0] or errors[0].startswith("error: interrupted")
    assert "rerun the same command" in errors[0]


@pytest.mark.slow
def test_the_pipeline_on_two_processes_is_that_on_one(world: Path, tmp_path: Path) -> None:
    for name, more in (("two", ["--num-processes", "2"]), ("one", [])):
        settings = (
            "--max-steps",
            "2",
            "--set",
            "batch_size=8",
            "--set",
            "warmup_steps=0",
            "--set",
            "micro_batch_size=4",
        )
        line = ("run", "-d", world / "data", "-m", world / "sft", "-o", tmp_path / name, *settings, *more)
        done = run_tisdpo(*line)
        assert (done.code, done.out) == (0, f"{tmp_path / name}\n"), done.err
        titles = [text.split()[0] for text in done.err.splitlines() if "/4 " in text]
        assert titles == ["1/4", "2/4", "3/4", "4/4"]
    for stage in ("dpo", "reverse", "scored", "tisdpo"):
        assert same_output(tmp_path / "one" / stage, tmp_path / "two" / stage), stage
    assert (tmp_path / "two" / "report.html").is_file()
