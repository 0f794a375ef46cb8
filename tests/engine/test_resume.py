"""Stopped anywhere, run again: the same bytes. Killed, interrupted, damaged, out of room, changed settings."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Listener, Tisdpo, largest_file, read_jsonl, write_jsonl

from tisdpo_cli.cli.error_messages import explain
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.engine.training.sft import train_sft
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.stage import StageResult
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

SHORT: dict[str, object] = {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0, "eval_pairs": 4}
LONG = {**SHORT, "max_steps": 120, "save_every": 2}
# One thread: on a busy machine a tiny model is many times faster so. It is the same in all processes that are compared.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def train(world: Path, out: Path, listener: Silent | None = None, **settings: object) -> StageResult:
    """train-dpo in this process."""
    given = {"model": world / "sft", "dataset": world / "data", "output_dir": out, **SHORT, **settings}
    flags = {name: value if isinstance(value, bool) else str(value) for name, value in given.items()}
    return train_pairs(load(COMMANDS["train-dpo"].settings, flags).settings, listener or Silent())


def fault_of(world: Path, out: Path, listener: Silent | None = None, **settings: object) -> tuple[int, str]:
    """Exit code and sentence of a train-dpo in this process that does not succeed."""
    try:
        train(world, out, listener, **settings)
    except (Exception, Interrupted) as fault:
        told = explain(fault)
        return told.exit_code, str(told)
    raise AssertionError("it did succeed")


def stop_after(world: Path, out: Path, updates: int, **settings: object) -> None:
    """A train-dpo that is interrupted, and leaves a checkpoint."""
    code, _ = fault_of(world, out, Listener(updates), **settings)
    assert code == 143


def command(world: Path, out: Path, **settings: object) -> list[str]:
    """The same as a command line."""
    given = {"model": world / "sft", "dataset": world / "data", "output_dir": out, **SHORT, **settings}
    options = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items())
    return ["train-dpo", *(part for option in options for part in option)]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The program in a process of its own, running."""
    return subprocess.Popen(
        [sys.executable, "-m", "tisdpo_cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )


def wait_until(process: subprocess.Popen[str], reached: Callable[[], object]) -> None:
    """Wait for something that a running process does."""
    while not reached():
        if process.poll() is not None:
            raise AssertionError(f"it ended before that:\n{process.communicate()[1]}")
        time.sleep(0.002)


def lines_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def result(out: Path) -> dict[str, bytes]:
    """Everything that others use of an output: the model with its tokenizer and card."""
    names = json.loads((out / "run.json").read_text())["files"]
    assert {"model.safetensors", "README.md"} <= set(names)
    return {name: (out / name).read_bytes() for name in names}


def curve(out: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock; every step must be there once."""
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [{name: value for name, value in row.items() if not name.endswith("_per_second")} for row in rows]


def assert_same(out: Path, whole: Path) -> None:
    assert result(out) == result(whole)
    assert curve(out) == curve(whole)


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SHORT, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    torch.set_num_threads(1)
    train(world, out)
    return out


# ---------------------------------------------------------------- processes that are killed


@pytest.mark.slow
def test_the_same_command_twice_makes_the_same_bytes(world: Path, tmp_path: Path, whole: Path) -> None:
    both = [start(command(world, tmp_path / name)) for name in "ab"]
    for process, name in zip(both, "ab", strict=True):
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out == f"{tmp_path / name}\n"
        assert_same(tmp_path / name, whole)


@pytest.mark.slow
def test_killed_again_and_again(world: Path, tmp_path: Path, tisdpo: Tisdpo) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    train(world, whole, **{**LONG, "save_every": 100})

    first = start(command(world, out, **LONG))
    wait_until(first, lambda: lines_of(out) >= 3)
    kill(first)

    second = start(command(world, out, **LONG))
    wait_until(second, lambda: lines_of(out) >= 20)
    code, text = fault_of(world, out, **LONG)
    assert (code, "another run" in text) == (2, True)
    wait_until(second, lambda: lines_of(out) >= 40 and list((out / "checkpoints").glob(".partial-*")))
    kill(second)
    assert not (out / "run.json").exists()
    assert not (out / "model.safetensors").exists()

    done = tisdpo(*command(world, out, **LONG), env=ONE_THREAD)
    assert done.code == 0, done.err
    assert f"resuming from {out / 'checkpoints'}" in done.err
    assert_same(out, whole)


FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tisdpo_cli.engine.training.preference", "tisdpo_cli.cli.app", "transformers.models.qwen2"]
)


def in_a_fork(arguments: list[str], said: Path, prepare: Callable[..., None] | None = None, *given: int) -> int:
    """Run the program in a forked process, which starts sooner, after `prepare` has laid a trap in it; its exit code.

    What it says on both streams is in the file `said`.
    """
    process = FORKS.Process(target=_forked, args=(arguments, str(said), prepare, *given))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _forked(arguments: list[str], said: str, prepare: Callable[..., None] | None, *given: int) -> None:
    torch.set_num_threads(1)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    if prepare is not None:
        prepare(*given)
    sys.argv = ["tisdpo", *arguments]
    from tisdpo_cli.cli.app import main

    main()


def _die_at_file_operation(number: int) -> None:
    """SIGKILL this process just before its n-th rename, removal, directory or fsync."""
    count = 0

    def trap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return counted

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, trap(getattr(os, name)))


@pytest.mark.slow
def test_killed_between_any_two_file_operations(world: Path, tmp_path: Path, whole: Path) -> None:
    """Each run comes a little further than the one before it: past the start, checkpoints, pruning, publishing."""
    out, err = tmp_path / "out", tmp_path / "err"
    arguments = command(world, out, save_every=2)
    for number in range(1, 200, 7):
        code = in_a_fork(arguments, err, _die_at_file_operation, number)
        assert code in (0, -signal.SIGKILL), err.read_text()
        finished = (out / "run.json").exists()
        assert not finished or result(out) == result(whole)
        if code == 0:
            break
    assert code == 0
    assert number > 30  # it was killed many times
    assert_same(out, whole)


# ---------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "optimizer"), [(signal.SIGTERM, 143, "rmsprop"), (signal.SIGINT, 130, "adamw")]
)
def test_a_signal_keeps_a_checkpoint_and_tells_how_to_go_on(
    world: Path, tmp_path: Path, number: int, code: int, optimizer: str
) -> None:
    out, whole = tmp_path / "out with a space", tmp_path / "whole"
    settings = {"max_steps": 100, "optimizer": optimizer}
    train(world, whole, **settings)
    process = start(command(world, out, **settings))
    wait_until(process, lambda: lines_of(out) >= 7)
    process.send_signal(number)
    stdout, err = process.communicate()
    assert (process.returncode, stdout) == (code, "")
    assert err.strip().splitlines()[-1].startswith("error: interrupted after step ")
    assert "Traceback" not in err
    (kept,) = checkpoints(out)
    assert int(kept.name.removeprefix("step-")) == lines_of(out) - 1

    (told,) = [line for line in err.splitlines() if line.startswith("resume with: ")]
    program, *arguments = shlex.split(told.removeprefix("resume with: "))
    assert program == "tisdpo"
    assert in_a_fork(arguments, tmp_path / "said") == 0, (tmp_path / "said").read_text()
    assert_same(out, whole)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw", "adam", "sgd"])
def test_interrupted_twice_the_curve_is_the_same(world: Path, tmp_path: Path, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "max_steps": 9, "eval_every": 2, "lr_scheduler": "cosine", "warmup_steps": 3}
    train(world, tmp_path / "whole", **settings)
    stop_after(world, tmp_path / "out", 1, **settings)
    stop_after(world, tmp_path / "out", 4, **settings)
    listener = Listener()
    made = train(world, tmp_path / "out", listener, **settings)
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert any("5 of 9 steps done" in said for said in listener.said)
    last = {k: v for k, v in made.record["final_metrics"].items() if not k.endswith("_per_second")}
    assert last == curve(tmp_path / "whole")[-1]


def test_a_signal_during_the_last_update_does_not_lose_it(world: Path, tmp_path: Path, whole: Path) -> None:
    stop_after(world, tmp_path / "out", 8)
    listener = Listener()
    train(world, tmp_path / "out", listener)
    assert any("8 of 8 steps done" in said for said in listener.said)
    assert_same(tmp_path / "out", whole)


def _terminate_in(target: str) -> Callable[..., Any]:
    import transformers

    where, name = {
        "loading": (transformers.AutoModelForCausalLM, "from_pretrained"),
        "saving": (transformers.PreTrainedModel, "save_pretrained"),
    }[target]
    original = getattr(where, name)

    def terminated(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    setattr(where, name, terminated)
    return terminated


def _terminate_while_loading() -> None:
    _terminate_in("loading")


def _terminate_while_saving() -> None:
    _terminate_in("saving")


def test_a_signal_while_the_model_is_loaded(world: Path, tmp_path: Path) -> None:
    code = in_a_fork(command(world, tmp_path / "out"), tmp_path / "err", _terminate_while_loading)
    assert code == 143, (tmp_path / "err").read_text()
    assert "cannot be loaded" not in (tmp_path / "err").read_text()


def test_a_signal_while_the_model_is_saved_loses_no_update(world: Path, tmp_path: Path, whole: Path) -> None:
    code = in_a_fork(command(world, tmp_path / "out"), tmp_path / "err", _terminate_while_saving)
    assert code in (0, 143)
    assert (tmp_path / "out" / "run.json").is_file() or checkpoints(tmp_path / "out"), "the training is lost"
    train(world, tmp_path / "out")
    assert_same(tmp_path / "out", whole)


# ---------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "truncated"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    world: Path, tmp_path: Path, whole: Path, name: str, damage: str
) -> None:
    out = tmp_path / "out"
    stop_after(world, out, 5, save_every=2)
    before, newest = checkpoints(out)
    if damage == "gone":
        (newest / name).unlink()
    else:
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: 0 if damage == "empty" else len(content) // 2])
    listener = Listener()
    train(world, out, listener, save_every=2)
    (warning,) = listener.warned
    assert str(newest) in warning
    assert any(str(before) in said and "4 of 8" in said for said in listener.said)
    assert_same(out, whole)


def test_a_checkpoint_whose_manifest_lists_no_file_is_damaged(world: Path, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    stop_after(world, out, 5, save_every=2)
    path = checkpoints(out)[-1] / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))
    (path.parent / "optimizer.safetensors").unlink()
    train(world, out, save_every=2)
    assert_same(out, whole)


def test_with_all_checkpoints_damaged_it_starts_again_and_keeps_its_progress(
    world: Path, tmp_path: Path, whole: Path
) -> None:
    out = tmp_path / "out"
    stop_after(world, out, 6, save_every=2)
    for path in checkpoints(out):
        (path / "model.safetensors").write_bytes(b"")
    listener = Listener(3)
    assert fault_of(world, out, listener)[0] == 143
    assert len(listener.warned) == 2
    listener = Listener()
    train(world, out, listener)
    assert any("3 of 8 steps done" in said for said in listener.said), "the checkpoint that was told of is lost"
    assert_same(out, whole)


# ---------------------------------------------------------------- other settings, and --resume


CHANGES = {
    "learning_rate": {"learning_rate": 2e-3},
    "seed": {"seed": 1},
    "batch_size": {"batch_size": 4},
    "max_steps": {"max_steps": 9},
    "beta": {"beta": 0.2},
    "optimizer": {"optimizer": "adam"},
    "max_length": {"max_length": 400},
}


@pytest.mark.parametrize("key", CHANGES)
def test_other_settings_are_refused_by_name(world: Path, tmp_path: Path, key: str) -> None:
    stop_after(world, tmp_path / "out", 3)
    before = sorted(path for path in tmp_path.rglob("*") if path.name != ".lock")
    code, text = fault_of(world, tmp_path / "out", **CHANGES[key])
    assert code == 2
    assert key in text
    assert sorted(tmp_path.rglob("*")) == before


def test_other_data_or_another_model_are_refused_by_name(world: Path, tmp_path: Path) -> None:
    rows = read_jsonl(world / "data" / "train.jsonl")
    data = write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    stop_after(world, tmp_path / "out", 3, dataset=data)
    rows[5]["chosen"] += "!"
    write_jsonl(data, rows)
    code, text = fault_of(world, tmp_path / "out", dataset=data)
    assert (code, "dataset" in text) == (2, True)

    made = train(world, tmp_path / "other", max_steps=1)
    stop_after(world, tmp_path / "out2", 3)
    code, text = fault_of(world, tmp_path / "out2", model=made.path)
    assert (code, "model" in text) == (2, True)


def test_what_does_not_shape_the_result_may_change(world: Path, tmp_path: Path, whole: Path) -> None:
    data, sft = tmp_path / "moved" / "data", tmp_path / "moved" / "sft"
    data.parent.mkdir()
    subprocess.run(["cp", "-r", world / "data", world / "sft", data.parent], check=True)
    stop_after(world, tmp_path / "out", 3)
    (tmp_path / "out").rename(tmp_path / "out2")
    train(world, tmp_path / "out2", model=sft, dataset=data, save_every=3, keep_checkpoints=1)
    assert_same(tmp_path / "out2", whole)


def test_overwrite_starts_over_with_other_settings(world: Path, tmp_path: Path) -> None:
    stop_after(world, tmp_path / "out", 3, beta=0.3)
    train(world, tmp_path / "out", beta=0.2, overwrite=True)
    train(world, tmp_path / "whole", beta=0.2)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_resume_never_starts_over(world: Path, tmp_path: Path, whole: Path) -> None:
    stop_after(world, tmp_path / "out", 5)
    listener = Listener()
    train(world, tmp_path / "out", listener, resume="never")
    assert not any("resuming" in said for said in listener.said)
    assert any("step-0" in said for said in listener.said)
    assert_same(tmp_path / "out", whole)


def test_resume_from_a_path(world: Path, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    stop_after(world, out, 5, save_every=2)
    older = checkpoints(out)[0]
    listener = Listener()
    train(world, out, listener, resume=older)
    assert any(str(older) in said and "4 of 8" in said for said in listener.said)
    assert_same(out, whole)


def test_resume_from_a_path_of_another_output(world: Path, tmp_path: Path, whole: Path) -> None:
    stop_after(world, tmp_path / "a", 5)
    train(world, tmp_path / "b", resume=checkpoints(tmp_path / "a")[0])
    assert result(tmp_path / "b") == result(whole)


def test_resume_from_the_last_step_of_another_output(world: Path, tmp_path: Path, whole: Path) -> None:
    train(world, tmp_path / "a", save_every=8)
    train(world, tmp_path / "b", resume=checkpoints(tmp_path / "a")[0])
    made, expected = result(tmp_path / "b"), result(whole)
    # The figures of the last update are in the other output: this card has those of the evaluation alone.
    assert made.pop("README.md") != expected.pop("README.md")
    assert made == expected


def test_resume_from_what_is_no_checkpoint_of_this_run(world: Path, tmp_path: Path) -> None:
    stop_after(world, tmp_path / "a", 3)
    checkpoint = checkpoints(tmp_path / "a")[0]
    for path in (tmp_path, tmp_path / "nowhere"):
        code, text = fault_of(world, tmp_path / "b", resume=path)
        assert (code, str(path) in text) == (2, True)
    code, text = fault_of(world, tmp_path / "b", resume=checkpoint, learning_rate=2e-3)
    assert (code, "learning_rate" in text) == (2, True)
    assert not (tmp_path / "b" / "run.json").exists()


def test_finished_is_finished(world: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    train(world, out)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir() if path.is_file()}
    assert in_a_fork(command(world, out), said) == 0
    assert said.read_text().strip().splitlines()[-1] == str(out)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir() if path.is_file()} == before
    code, text = fault_of(world, out, learning_rate=2e-3)
    assert (code, "learning_rate" in text) == (2, True)


# ---------------------------------------------------------------- no pairs, no room, no right to write


def test_a_run_without_a_possible_pair_is_a_fault(world: Path, tmp_path: Path) -> None:
    rows = [{**row, "rejected": row["chosen"]} for row in read_jsonl(world / "data" / "train.jsonl")]
    code, text = fault_of(world, tmp_path / "out", dataset=write_jsonl(tmp_path / "equal.jsonl", rows))
    assert code == 1
    assert "24" in text
    code, text = fault_of(world, tmp_path / "out", dataset=write_jsonl(tmp_path / "empty.jsonl", []))
    assert code == 1
    assert not (tmp_path / "out" / "run.json").exists()


def test_no_room_for_a_checkpoint_leaves_the_last_one(world: Path, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    stop_after(world, out, 3)
    (kept,) = checkpoints(out)
    line = shlex.join([sys.executable, "-m", "tisdpo_cli", *command(world, out, save_every=2)])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 100; {line}"], capture_output=True, text=True, env={**os.environ, **ONE_THREAD}
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {out / 'checkpoints'}: the checkpoint of step 4 cannot be written")
    assert len(last) <= 300
    assert checkpoints(out) == [kept]
    train(world, out)
    assert_same(out, whole)


def test_no_room_for_the_metrics_leaves_the_last_checkpoint(world: Path, tmp_path: Path) -> None:
    flags = {"dataset": str(world / "data"), "output_dir": str(tmp_path / "tiny"), "init": True, "max_steps": 1}
    shape = {"vocab_size": 258, "hidden_size": 8, "heads": 1, "layers": 1}
    train_sft(load(COMMANDS["train-sft"].settings, {**flags, **shape}).settings, Silent())
    settings = {"model": tmp_path / "tiny", "max_steps": 100, "save_every": 20, "eval_pairs": 0}
    train(world, tmp_path / "whole", **settings)
    size = (tmp_path / "whole" / "metrics.jsonl").stat().st_size
    biggest = max(path.stat().st_size for path in tmp_path.rglob("*") if path.name != "metrics.jsonl")
    assert size > biggest + 1000, "the metrics must be what hits the limit"
    with largest_file(biggest + 500):
        code, text = fault_of(world, tmp_path / "out", **settings)
    assert code == 1
    assert "metrics.jsonl" in text
    assert checkpoints(tmp_path / "out")
    train(world, tmp_path / "out", **settings)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_no_room_for_the_model_is_not_a_fault_of_the_program(world: Path, tmp_path: Path, whole: Path) -> None:
    with largest_file(100_000):
        code, text = fault_of(world, tmp_path / "out")
    assert code == 1
    assert str(tmp_path / "out") in text
    assert "fault of the program" not in text
    assert not (tmp_path / "out" / "model.safetensors").exists()
    train(world, tmp_path / "out")
    assert_same(tmp_path / "out", whole)


def _without_rights_over_files() -> None:
    """Even root may then write only where the permissions say so (PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_where_nothing_may_be_written_it_is_told(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    done = subprocess.run(
        [sys.executable, "-m", "tisdpo_cli", *command(world, folder / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, **ONE_THREAD},
        preexec_fn=_without_rights_over_files,
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert str(folder / "out") in line
    assert "Permission denied" in line
    code, text = fault_of(world, world / "data" / "train.jsonl" / "out")
    assert (code, "cannot be written" in text) == (1, True)
