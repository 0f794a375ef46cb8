"""Two CPU processes: the same losses and bytes as one, every pair once, one voice, and no silent running alone."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import processes
import pytest
from conftest import Done, read_jsonl, write_jsonl
from processes import CPU, LAUNCHER, PROGRAM, arguments, curve, with_dynamic_rope

import tisdpo_cli
from tisdpo_cli.engine.scoring.estimate import estimate
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.engine.training.sft import train_sft
from tisdpo_cli.errors import DataError, Interrupted, OutOfMemory, PeerEnded
from tisdpo_cli.reporter import Silent
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

pytestmark = pytest.mark.slow

SOURCE = str(Path(tisdpo_cli.__file__).parents[1])
SHORT: dict[str, object] = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0}


def start(command: str, *, program: Sequence[str] = PROGRAM, env: dict[str, str] = CPU, **settings: object):
    """The command on two processes, running."""
    return processes.start(2, arguments(command, settings), program, env)


def on_two(command: str, *, program: Sequence[str] = PROGRAM, env: dict[str, str] = CPU, **settings: object) -> Done:
    """Run a command on two processes."""
    process = start(command, program=program, env=env, **settings)
    out, err = process.communicate(timeout=240)
    return Done(process.returncode, out, err)


def on_one(command: str, **settings: object) -> None:
    """Run a command in this process."""
    flags = {name: value if isinstance(value, bool) else str(value) for name, value in settings.items()}
    engine = {"estimate": estimate, "train-sft": train_sft}.get(command, train_pairs)
    engine(load(COMMANDS[command].settings, flags).settings, Silent())


def model_bytes(out: Path) -> bytes:
    """Of a model, or of an adapter."""
    (path,) = out.glob("*model.safetensors")
    return path.read_bytes()


def said_by_the_program(err: str) -> list[str]:
    """Its lines, without those of torchrun."""
    return [line for line in err.splitlines() if line.strip() and "torch" not in line and "gloo" not in line.lower()]


def test_two_processes_are_one_with_twice_the_accumulation_to_the_byte(world: Path, tmp_path: Path) -> None:
    """Four pairs on each of two processes, or four and four after each other; only the first process speaks."""
    given = {**SHORT, "model": world / "sft", "dataset": world / "data"}
    given["micro_batch_size"] = 4
    done = on_two("train-dpo", **given, output_dir=tmp_path / "two", eval_every=3)
    assert (done.code, done.out) == (0, f"{tmp_path / 'two'}\n"), done.err
    lines = said_by_the_program(done.err)
    assert any("on each of 2 processes" in line for line in lines)
    assert len(lines) == len(set(lines)), "a line was said twice"
    on_one("train-dpo", **given, output_dir=tmp_path / "one", eval_every=3)
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    assert model_bytes(tmp_path / "two") == model_bytes(tmp_path / "one")


@pytest.mark.parametrize("method", [{"alpha": 0.5}, {"loss": "tdpo2"}], ids=str)
def test_distributions_are_compared_the_same_on_two_processes(world: Path, tmp_path: Path, method: dict) -> None:
    given = {
        **SHORT,
        **method,
        "max_steps": 3,
        "model": world / "sft",
        "dataset": world / "data",
        "micro_batch_size": 4,
    }
    done = on_two("train-dpo", **given, output_dir=tmp_path / "two")
    assert done.code == 0, done.err
    on_one("train-dpo", **given, output_dir=tmp_path / "one")
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    assert model_bytes(tmp_path / "two") == model_bytes(tmp_path / "one")


ADAPTER = {"lora_r": 4, "optimizer": "adamw"}


@pytest.mark.parametrize(
    ("command", "more"),
    [("train-sft", {}), ("train-sft", ADAPTER), ("train-dpo", ADAPTER), ("train-reverse", {})],
    ids=["sft", "sft of an adapter", "dpo of an adapter", "reverse"],
)
def test_every_training_is_the_same_on_two_processes(world: Path, tmp_path: Path, command: str, more: dict) -> None:
    # Passes of the same size, whatever the number of processes.
    given = {**SHORT, **more, "max_steps": 3, "micro_batch_size": 4, "eval_batch_size": 4}
    given |= {"model": world / "sft", "dataset": world / "data"}
    done = on_two(command, **given, output_dir=tmp_path / "two")
    assert (done.code, done.out) == (0, f"{tmp_path / 'two'}\n"), done.err
    lines = said_by_the_program(done.err)
    assert len(lines) == len(set(lines)), "a line was said twice"
    on_one(command, **given, output_dir=tmp_path / "one")
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    assert model_bytes(tmp_path / "two") == model_bytes(tmp_path / "one")


def test_a_new_model_is_made_once_for_all(world: Path, tmp_path: Path) -> None:
    """Its tokenizer and its random weights too."""
    shape = {"vocab_size": 300, "hidden_size": 16, "layers": 1, "heads": 2}
    given = {"batch_size": 8, "micro_batch_size": 4, "max_steps": 2, "warmup_steps": 0, "dataset": world / "data"}
    for name, launcher in (("two", [*LAUNCHER, "2"]), ("one", [sys.executable])):
        line = arguments("train-sft", {**given, **shape, "output_dir": tmp_path / name})
        done = subprocess.run(
            [*launcher, *PROGRAM, *line, "--init"],
            capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **CPU},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_pairs_that_do_not_divide_are_each_used_once(contrast: Path, tmp_path: Path) -> None:
    """23 train and 7 test pairs, 3 per update, 1 per pass: some passes are empty on one of the processes.

    Bound: sums are taken in another order, so metrics agree to 1e-5 of their size.
    """
    for split, count in (("train", 23), ("test", 7)):
        rows = read_jsonl(contrast / "scored" / f"{split}.jsonl")[:count]
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    given = {"model": contrast / "sft", "dataset": tmp_path / "data", "warmup_steps": 0, "learning_rate": 1e-4}
    given.update({"batch_size": 3, "micro_batch_size": 1, "epochs": 1, "transform": "rank_based"})
    done = on_two("train", **given, output_dir=tmp_path / "two")
    assert done.code == 0, done.err
    on_one("train", **given, output_dir=tmp_path / "one")
    two, one = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert len(two) == len(one) == 9
    for row, other in zip(two, one, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (record["updates"], record["pairs"]) == (8, 23)


def test_steps_and_the_kl_term_are_the_same_on_two_processes(contrast: Path, tmp_path: Path) -> None:
    """Weights are made of the whole dataset, its mean included, on each process; the KL term is weighted too."""
    given = {**SHORT, "max_steps": 3, "model": contrast / "sft", "dataset": contrast / "scored", "alpha": 0.5}
    given.update({"center": "dataset", "spans": "word", "dead_zone": 0.1, "decay": 0.95, "micro_batch_size": 4})
    done = on_two("train", **given, output_dir=tmp_path / "two")
    assert done.code == 0, done.err
    on_one("train", **given, output_dir=tmp_path / "one")
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    assert model_bytes(tmp_path / "two") == model_bytes(tmp_path / "one")


@pytest.mark.parametrize("by", ["two models", "two prompts"])
def test_estimate_on_two_processes_writes_the_same_bytes(contrast: Path, tmp_path: Path, by: str) -> None:
    two_models = {"forward": contrast / "dpo", "reverse": contrast / "reverse"}
    sides = two_models if by == "two models" else {"model": contrast / "sft"}
    given = {**sides, "dataset": contrast / "data"}
    done = on_two("estimate", **given, output_dir=tmp_path / "two", batch_size=1)
    assert (done.code, done.out) == (0, f"{tmp_path / 'two'}\n"), done.err
    lines = said_by_the_program(done.err)
    assert len(lines) == len(set(lines)), "a line was said twice"
    on_one("estimate", **given, output_dir=tmp_path / "one", batch_size=1)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_evaluate_on_two_processes_gives_the_same_figures_and_samples(contrast: Path, tmp_path: Path) -> None:
    """Batches of 3 do not divide the 16 rows of pairs or the 12 responses; rewards are asked for once."""
    (tmp_path / "taste.py").write_text(
        "def length(prompts, responses):\n"
        f"    with open({str(tmp_path / 'calls')!r}, 'a') as calls:\n        calls.write('once ')\n"
        "    return [len(r) for r in responses]\n"
    )
    given = {"model": contrast / "dpo", "baseline": contrast / "reverse", "ref_model": contrast / "sft"}
    given |= {"dataset": contrast / "data", "batch_size": 3, "sample_prompts": 6, "samples_per_prompt": 2}
    given |= {"max_new_tokens": 12, "scorer": "taste:length"}
    outputs = []
    for name, launcher in (("two", [*LAUNCHER, "2"]), ("one", [sys.executable])):
        options = arguments("evaluate", {**given, "samples": tmp_path / name})
        done = subprocess.run(
            [*launcher, *PROGRAM, *options, "--json"], capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, **CPU, "PYTHONPATH": os.pathsep.join([str(tmp_path), SOURCE])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = said_by_the_program(done.stderr)
        assert len(lines) == len(set(lines)), "a line was said twice"
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0])["policies"][0]["samples"]["reward"] is not None
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "calls").read_text() == "once once "


def test_interrupted_on_two_processes_and_gone_on(world: Path, tmp_path: Path) -> None:
    """torchrun passes SIGTERM on; each process answers after the same update, the first one keeps a checkpoint."""
    given = {**SHORT, "max_steps": 60, "model": world / "sft", "dataset": world / "data", "micro_batch_size": 4}
    process = start("train-dpo", **given, output_dir=tmp_path / "two")
    metrics = tmp_path / "two" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 8:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out == ""
    assert len([line for line in err.splitlines() if line.startswith("error: interrupted after step ")]) == 1
    assert list((tmp_path / "two" / "checkpoints").glob("step-*"))
    assert not (tmp_path / "two" / "run.json").exists()

    done = on_two("train-dpo", **given, output_dir=tmp_path / "two")
    assert done.code == 0, done.err
    assert "resuming from" in done.err
    on_one("train-dpo", **given, output_dir=tmp_path / "one")
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    assert model_bytes(tmp_path / "two") == model_bytes(tmp_path / "one")


def test_without_a_gpu_torchrun_needs_to_be_told_nothing(world: Path, tmp_path: Path) -> None:
    """accelerate alone would run two trainings in one output directory."""
    given = {**SHORT, "model": world / "sft", "dataset": world / "data", "output_dir": tmp_path / "out"}
    done = on_two("train-dpo", **given, env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.code == 0, done.err
    assert "on each of 2 processes" in done.err


def test_rows_that_must_not_share_a_pass_train_the_same_on_two_processes(world: Path, tmp_path: Path) -> None:
    """Rope scaling that depends on the longest row: a forward pass may be several of the model."""
    model = with_dynamic_rope(world / "sft", tmp_path / "sft", 38)
    given = {**SHORT, "max_steps": 3, "model": model, "dataset": world / "data", "micro_batch_size": 4}
    given |= {"max_length": 38, "max_prompt_length": 20}
    done = on_two("train-dpo", **given, output_dir=tmp_path / "two")
    assert done.code == 0, done.err
    on_one("train-dpo", **given, output_dir=tmp_path / "one")
    assert curve(tmp_path / "two") == curve(tmp_path / "one")


@pytest.mark.parametrize("more", [{"lora_r": 4, "load_in_4bit": True}, {"optimizer": "adamw8bit"}], ids=str)
def test_weights_and_optimizers_of_few_bits_train_the_same_on_two_processes(
    world: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    given = {**SHORT, **more, "max_steps": 3, "model": world / "sft", "dataset": world / "data", "micro_batch_size": 4}
    done = on_two("train-dpo", **given, output_dir=tmp_path / "two")
    assert done.code == 0, done.err
    on_one("train-dpo", **given, output_dir=tmp_path / "one")
    for row, other in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_the_pipeline_on_two_processes_speaks_once(world: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"{{dataset: {world / 'data'}, model: {world / 'sft'}, output_dir: {tmp_path / 'out'}, max_steps: 2, "
        "batch_size: 8, warmup_steps: 0}\n"
    )
    done = on_two("run", config=config)
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
    titles = [line for line in done.err.splitlines() if "/4 " in line]
    assert [title.split()[0] for title in titles] == ["1/4", "2/4", "3/4", "4/4"]


FAILS_ON_THE_SECOND = """
import os
import {module} as module
from tisdpo_cli.cli.app import main

def no_room(*_):
    raise {fault}

if os.environ["RANK"] == "1":
    module.{name} = no_room
main()
"""
NO_ROOM = "OSError(28, 'No space left on device')"
NOT_FINITE = "module.RankError('a log-prob is not finite')"
NO_MEMORY = "RuntimeError('CUDA out of memory')"


@pytest.mark.parametrize(
    ("command", "module", "name", "fault", "message"),
    [
        ("estimate", "scoring.scorer", "save_file", NO_ROOM, "No space left on device"),
        ("evaluate", "evaluation.policies", "compare", NOT_FINITE, "a log-prob is not finite"),
        ("evaluate", "evaluation.policies", "sample", NO_MEMORY, "out of memory while generating; lower --batch-size"),
    ],
    ids=["estimate", "evaluate", "generate"],
)
def test_a_fault_of_the_second_process_alone_is_told_once(
    contrast: Path, tmp_path: Path, command: str, module: str, name: str, fault: str, message: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(FAILS_ON_THE_SECOND.format(module=f"tisdpo_cli.engine.{module}", name=name, fault=fault))
    models = {"model": contrast / "dpo", "ref_model": contrast / "sft"}
    given: dict[str, object] = {**models, "batch_size": 2, "max_new_tokens": 4}
    if command == "estimate":
        models = {"forward": contrast / "dpo", "reverse": contrast / "reverse"}
        given = {**models, "output_dir": tmp_path / "out", "batch_size": 1}
    done = on_two(
        command, **given, dataset=contrast / "data", program=[str(program)], env={**CPU, "PYTHONPATH": SOURCE}
    )
    assert done.code != 0
    assert done.out == ""
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.err
    assert message in errors[0]
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    "fault",
    [
        DataError("no prompt", where="rows.jsonl:3", fix="give it one", details=("a", "b")),
        Interrupted(signal.SIGINT, "interrupted after step 3", fix="rerun the same command to resume"),
        OutOfMemory("generating", fix="free memory"),
        PeerEnded(),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_fault_is_the_same_out_of_another_process(fault):
    again = pickle.loads(pickle.dumps(fault))
    assert (type(again), str(again), again.exit_code) == (type(fault), str(fault), fault.exit_code)
    assert (again.where, again.fix, again.details) == (fault.where, fault.fix, fault.details)
