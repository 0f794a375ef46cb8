"""FSDP2 on CPU processes: the same training as on one, to rounding; checkpoints that any number of processes read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import read_jsonl, run_here, run_tisdpo, write_jsonl
from processes import arguments, curve, on_ranks, run_jobs, start, with_dynamic_rope
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS = 20
# Two processes make the forward passes of one: four pairs each, or four and four after each other.
SAME_PASSES: dict[str, Any] = {"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 4, "warmup_steps": 0}
# Batches of 5 pairs, 3 passes: some are empty on a process; 23 pairs and 7 to evaluate.
RAGGED: dict[str, Any] = {**SAME_PASSES, "batch_size": 5, "micro_batch_size": 1, "ragged": True}
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.05}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("train-dpo", {**SAME_PASSES, **SGD, "eval_every": 7}),
    "defaults": ("train-dpo", {**SAME_PASSES, "warmup_steps": 150}),
    "adamw": ("train-dpo", {**SAME_PASSES, "optimizer": "adamw", "learning_rate": 1e-4}),
    "adamw, parameters": (
        "train-dpo",
        {
            **SAME_PASSES,
            "optimizer": "adamw",
            "learning_rate": 1e-4,
            "adam_beta2": 0.95,
            "weight_decay": 0.1,
            "no_decay": "norm,bias",
            "lr_scheduler": "cosine",
        },
    ),
    "momentum": ("train-dpo", {**SAME_PASSES, **SGD, "momentum": 0.5, "learning_rate": 0.02}),
    "adagrad": ("train-dpo", {**SAME_PASSES, "optimizer": "adagrad", "learning_rate": 1e-4}),
    "adamax": ("train-dpo", {**SAME_PASSES, "optimizer": "adamax", "learning_rate": 1e-4}),
    "nadam": ("train-dpo", {**SAME_PASSES, "optimizer": "nadam", "learning_rate": 1e-4}),
    "radam": ("train-dpo", {**SAME_PASSES, "optimizer": "radam", "learning_rate": 1e-4}),
    "reverse, ragged": ("train-reverse", {**RAGGED, **SGD}),
    "alpha": ("train-dpo", {**SAME_PASSES, **SGD, "alpha": 0.5}),
    "tdpo1": ("train-dpo", {**SAME_PASSES, **SGD, "loss": "tdpo1"}),
    "tdpo2, ragged": ("train-dpo", {**RAGGED, **SGD, "loss": "tdpo2"}),
    "ipo": ("train-dpo", {**SAME_PASSES, **SGD, "learning_rate": 1e-3, "loss": "ipo"}),
    "another reference": ("train-dpo", {**SAME_PASSES, **SGD, "ref_model": "dpo"}),
    "distribution of another reference": ("train-dpo", {**SAME_PASSES, **SGD, "ref_model": "dpo", "alpha": 0.5}),
    "weighted": ("train", {**SAME_PASSES, **SGD, "transform": "rank_based"}),
    "bf16": ("train-dpo", {**SAME_PASSES, "optimizer": "sgd", "learning_rate": 1e-3, "dtype": "bf16"}),
    "bf16, ragged": ("train-dpo", {**RAGGED, "optimizer": "sgd", "learning_rate": 1e-3, "dtype": "bf16"}),
    "bf16, one pair to evaluate": (
        "train-dpo",
        {**SAME_PASSES, "optimizer": "sgd", "learning_rate": 1e-3, "dtype": "bf16", "eval_pairs": 1},
    ),
    "gradient checkpointing": ("train-dpo", {**SAME_PASSES, **SGD, "gradient_checkpointing": True}),
    "gradient checkpointing in bf16": (
        "train-dpo",
        {**SAME_PASSES, "optimizer": "sgd", "learning_rate": 1e-3, "gradient_checkpointing": True, "dtype": "bf16"},
    ),
    "separate rows": ("train-dpo", {**SAME_PASSES, **SGD, "layout": "separate"}),
    "LoRA": ("train-dpo", {**SAME_PASSES, **SGD, "lora_r": 4}),
    "LoRA in bf16": ("train-dpo", {**SAME_PASSES, **SGD, "lora_r": 4, "dtype": "bf16"}),
    "LoRA, tdpo2, ragged": ("train-dpo", {**RAGGED, **SGD, "lora_r": 4, "loss": "tdpo2"}),
    "DoRA": ("train-dpo", {**SAME_PASSES, **SGD, "lora_r": 4, "dora": True}),
    "sft": ("train-sft", {**SAME_PASSES, **SGD, "target": "both"}),
    "sft, LoRA, ragged": ("train-sft", {**RAGGED, **SGD, "lora_r": 4}),
}


def prepared(world: Path, name: str, out: Path, shard: str = "none", **more: Any) -> tuple[str, dict[str, Any]]:
    """A case as a job; its reference log-probs are computed every time."""
    command, settings = CASES[name]
    data = "ragged" if settings.get("ragged") else "scored" if command == "train" else "data"
    given = {"model": world / "sft", "dataset": world / data, "output_dir": out, "shard": shard, **settings, **more}
    given.pop("ragged", None)
    if "ref_model" in given:
        given["ref_model"] = world / given["ref_model"]
    if command != "train-sft":
        given.setdefault("no_ref_cache", True)
    return command, given


@pytest.fixture(scope="module")
def ragged(contrast: Path) -> Path:
    """The world with `ragged/`: 23 and 7 pairs."""
    for split, count in (("train", 23), ("test", 7)):
        rows = read_jsonl(contrast / "data" / f"{split}.jsonl")[:count]
        write_jsonl(contrast / "ragged" / f"{split}.jsonl", rows)
    return contrast


@pytest.fixture(scope="module")
def trained(ragged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on one process, and sharded over two."""
    root = tmp_path_factory.mktemp("sharded")
    for ranks, shard in ((1, "none"), (2, "full")):
        run_jobs(ranks, [prepared(ragged, name, root / str(ranks) / name, shard) for name in CASES], root)
    return root


def tensors_of(out: Path) -> dict[str, Any]:
    adapter = out / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else out / "model.safetensors")


def assert_same_training(out: Path, other: Path, weights: float = 1e-6, metrics: float = 1e-5) -> None:
    """Bounds: absolute for weights, relative for metrics, which are sums of up to hundreds of nats."""
    ours, theirs = tensors_of(out), tensors_of(other)
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)
    assert worst <= weights
    rows, others = curve(out), curve(other)
    assert len(rows) == len(others)
    for row, expected in zip(rows, others, strict=True):
        assert row == pytest.approx(expected, rel=metrics, abs=metrics)


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_training_is_that_of_one_process(trained: Path, name: str) -> None:
    assert_same_training(trained / "2" / name, trained / "1" / name)


def test_three_processes(ragged: Path, trained: Path, tmp_path: Path) -> None:
    """Rows that do not divide, and processes without a row of some tensors."""
    names = ["reverse, ragged", "tdpo2, ragged", "LoRA, tdpo2, ragged"]
    run_jobs(3, [prepared(ragged, name, tmp_path / name, "full") for name in names], tmp_path)
    for name in names:
        assert_same_training(tmp_path / name, trained / "1" / name)


def test_reference_log_probs_are_shared_with_a_run_on_one_process(ragged: Path, tmp_path: Path) -> None:
    cached = {"no_ref_cache": False, "cache_dir": tmp_path / "cache"}
    run_jobs(2, [prepared(ragged, "dpo", tmp_path / "two", "full", **cached)], tmp_path)
    command, given = prepared(ragged, "dpo", tmp_path / "one", "none", **cached)
    done = run_here(*arguments(command, given))
    assert done.code == 0, done.err
    assert "reference log-probs of 24 pairs read from the cache" in done.err
    assert_same_training(tmp_path / "two", tmp_path / "one")


def test_a_new_model_can_be_sharded(ragged: Path, tmp_path: Path) -> None:
    shape = {"init": True, "vocab_size": 320, "hidden_size": 32, "layers": 2, "heads": 2, "max_steps": 4}
    jobs = [
        (
            "train-sft",
            {**SAME_PASSES, **shape, "dataset": ragged / "data", "output_dir": tmp_path / name, "shard": name},
        )
        for name in ("none", "full")
    ]
    run_jobs(1, jobs[:1], tmp_path)
    run_jobs(2, jobs[1:], tmp_path)
    assert_same_training(tmp_path / "full", tmp_path / "none")


def test_shards_in_cpu_memory_change_nothing(ragged: Path, trained: Path, tmp_path: Path) -> None:
    run_jobs(2, [prepared(ragged, "dpo", tmp_path / "out", "full", cpu_offload=True)], tmp_path)
    assert_same_training(tmp_path / "out", trained / "2" / "dpo", weights=0, metrics=0)


def test_the_model_opens_anywhere(trained: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(trained / "2" / "dpo", output_loading_info=True)
    assert not any(info.values())
    assert sorted(p.name for p in (trained / "2" / "dpo").iterdir()) == sorted(
        p.name for p in (trained / "1" / "dpo").iterdir()
    )
    config = [json.loads((trained / n / "dpo" / "config.json").read_text()) for n in ("1", "2")]
    assert config[0] == config[1]


# ---------------------------------------------------------------- launched by accelerate, and refused

# As small as accelerate takes it.
FSDP2 = """
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_activation_checkpointing: true, fsdp_offload_params: false}
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: bf16
use_cpu: true
"""


def test_accelerates_configuration_shards_too(ragged: Path, trained: Path, tmp_path: Path) -> None:
    """Its activation checkpointing counts; precision is decided by --dtype alone."""
    (tmp_path / "fsdp2.yaml").write_text(FSDP2)
    command, given = prepared(ragged, "dpo", tmp_path / "out", "auto")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--config_file", str(tmp_path / "fsdp2.yaml")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    done = subprocess.run(
        [*launcher, "-m", "tisdpo_cli", *arguments(command, given)],
        capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"}, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FSDP2: weights, gradients and optimizer are split over 2 processes" in done.stderr
    assert_same_training(tmp_path / "out", trained / "1" / "dpo")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": "adamw8bit"}, "--optimizer adamw8bit: its state cannot be sharded; use adamw"),
        ({"optimizer": "adafactor"}, "--optimizer adafactor: its state cannot be sharded; use adamw"),
        ({"sample_every": 2}, "--sample-every: a sharded model cannot be sampled; use --shard none"),
        ({"lora_r": 4, "load_in_4bit": True}, "--load-in-4bit: weights in 4 bits cannot be sharded; use --shard none"),
    ],
    ids=str,
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_loaded(
    ragged: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    command, given = prepared(ragged, "dpo", tmp_path / "out", "full", num_processes=2, **more)
    done = run_tisdpo(*arguments(command, given))
    assert (done.code, done.error) == (2, f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_rows_share_passes_by_length_is_refused(ragged: Path, tmp_path: Path) -> None:
    """Its forward passes would differ in number among processes, which would wait for each other for ever."""
    model = with_dynamic_rope(ragged / "sft", tmp_path / "sft", 32)
    command, given = prepared(ragged, "dpo", tmp_path / "out", "full", num_processes=2)
    given |= {"model": model, "max_length": 32, "max_prompt_length": 20}
    done = run_tisdpo(*arguments(command, given))
    assert done.code == 1
    assert "cannot be sharded: which rows share a forward pass depends on their length" in done.error


# ---------------------------------------------------------------- killed and resumed


def killed_after(lines: int, out: Path, ranks: int, who: str, words: list[str]) -> None:
    """Run a training and kill one of its processes, or all, once its metrics have so many lines."""
    process = start(ranks, words)
    metrics = out / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    workers = children(process.pid)
    for victim in [process.pid, *workers] if who == "all" else workers[-1:]:
        os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (out / "run.json").exists()


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("who", ["one", "all"])
def test_a_killed_run_resumes_to_the_same_bytes(ragged: Path, tmp_path: Path, who: str) -> None:
    command, given = prepared(ragged, "adamw", tmp_path / "out", "full", save_every=1, max_steps=STEPS)
    whole = {**given, "output_dir": tmp_path / "whole"}
    killed_after(6, tmp_path / "out", 2, who, arguments(command, given))
    checkpoints = sorted(p.name for p in (tmp_path / "out" / "checkpoints").glob("step-*"))
    assert checkpoints
    newest = tmp_path / "out" / "checkpoints" / checkpoints[-1]
    assert {p.name for p in newest.iterdir()} == {
        "checkpoint.json",
        *(f"{kind}-0000{k}-of-00002.safetensors" for kind in ("model", "optimizer") for k in (1, 2)),
    }
    shutil.copytree(tmp_path / "out", tmp_path / "one")
    shutil.copytree(tmp_path / "out", tmp_path / "three")
    done = on_ranks(2, command, **given)
    assert done.code == 0, done.err
    assert "resuming from" in done.err
    run_jobs(2, [(command, whole)], tmp_path)
    model = "model.safetensors"
    assert (tmp_path / "out" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")
    # Another number of processes: the same to rounding.
    one = {**given, "output_dir": tmp_path / "one"}
    done = run_here(*arguments(command, one))
    assert done.code == 0, done.err
    assert "resuming from" in done.err
    assert "--shard full has no effect on a single process" in done.err
    done = on_ranks(3, command, **{**given, "output_dir": tmp_path / "three"})
    assert done.code == 0, done.err
    assert "resuming from" in done.err
    for name in ("one", "three"):
        assert_same_training(tmp_path / name, tmp_path / "whole")
