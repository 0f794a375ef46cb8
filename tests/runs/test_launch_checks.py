"""Launch mistakes: each is stopped with a sentence that says what to type instead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Done, run_here

from tisdpo_cli.errors import TrainingError
from tisdpo_cli.runs.launch_checks import check_processes, check_request

MULTI_CPU = {"ACCELERATE_DYNAMO_MODE": "default", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_")) or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1 is not supported"),
        ({"ACCELERATE_USE_FSDP": "1"}, "FSDP version 1 is not supported"),
    ],
)
def test_other_kinds_of_sharding_show_the_way_to_fsdp2(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], what: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=f"{what}; use FSDP2: .*fsdp_version: 2"):
        check_request()


def test_what_is_supported_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_request()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_request()


def test_fewer_processes_than_launched_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)
    with pytest.raises(TrainingError, match="launched for 2 processes but running as 1; use --num-processes"):
        check_processes(1)


def test_one_process_of_accelerate_that_was_to_be_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_processes(1)
    for name, value in MULTI_CPU.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=r"asked for several processes but started one.*use --num-processes N"):
        check_processes(1)
    # A real launch of several sets this one too.
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_processes(1)


def test_a_mistake_is_one_line(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    done = run_here("evaluate", "-m", world / "sft", "--ref-model", world / "sft", "-d", world / "data")
    assert (done.code, done.out) == (1, "")
    assert done.error.startswith("error: DeepSpeed is not supported; use FSDP2: ")
    assert len(done.error) <= 300


def launched(tmp_path: Path, world: Path, config: str, *options: str) -> Done:
    (tmp_path / "launch.yaml").write_text(config)
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0", *options]
    line += ["--config_file", str(tmp_path / "launch.yaml")] if config else []
    line += ["-m", "tisdpo_cli", "train-dpo", "-m", str(world / "sft"), "-d", str(world / "data")]
    line += ["-o", str(tmp_path / "out"), "--max-steps", "2"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("{distributed_type: MULTI_CPU, num_processes: 2, num_machines: 1, use_cpu: true}", (), "but started one"),
        ("", ("--cpu", "--num_processes", "2"), "but started one"),
        (
            "{distributed_type: FSDP, num_processes: 2, num_machines: 1, fsdp_config: {fsdp_version: 1}}", (),
            "FSDP version 1 is not supported",
        ),
    ],
    ids=["MULTI_CPU", "--cpu", "FSDP 1"],
)  # fmt: skip
def test_accelerate_itself_is_understood(
    world: Path, tmp_path: Path, config: str, options: tuple[str, ...], message: str
) -> None:
    complete = config.replace("{", "{compute_environment: LOCAL_MACHINE, ", 1)
    done = launched(tmp_path, world, complete, *options)
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert (done.code, done.out, len(errors)) == (1, "", 1), done.err
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_accelerate_with_one_process_is_no_mistake(world: Path, tmp_path: Path) -> None:
    done = launched(tmp_path, world, "", "--cpu", "--num_processes", "1", "--num_machines", "1")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
