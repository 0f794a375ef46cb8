"""Out of memory: the error says in what, and names settings of this command that are in force and lower it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import Done, pair_rows, run_here

from tisdpo_cli.errors import OutOfMemory, is_out_of_memory, naming_out_of_memory
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.memory_advice import explaining_out_of_memory, memory_advice
from tisdpo_cli.settings.sources import load

ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 8 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(12, "Cannot allocate memory"),
    pa.ArrowMemoryError("malloc of size 64 failed"),
]
EVERY = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)

GIVEN = {
    "train-dpo": {"model": "m", "dataset": "d", "output_dir": "o"},
    "train-sft": {"model": "m", "dataset": "d", "output_dir": "o"},
    "estimate": {"forward": "f", "reverse": "r", "dataset": "d", "output_dir": "o"},
    "evaluate": {"model": "m", "ref_model": "f", "dataset": "d"},
    "inspect-weights": {"scored": "s"},
}


def advice(command: str, activity: Any = "", stage: str = "", **given: object) -> str:
    flags = {**GIVEN[command], **{name: str(value) for name, value in given.items() if value is not True}}
    flags |= {name: value for name, value in given.items() if value is True}
    return memory_advice(load(COMMANDS[command].settings, flags, environ={}).settings, activity, stage)


LORA = ", or train an adapter with --lora-r"


@pytest.mark.parametrize(
    ("command", "given", "activity", "expected"),
    [
        ("train-dpo", {}, "",
         "lower --tokens-per-microbatch or --max-length (now 512), or use --gradient-checkpointing" + LORA),
        ("train-dpo", {"tokens_per_microbatch": 4096, "gradient_checkpointing": True}, "",
         "lower --tokens-per-microbatch (now 4096) or --max-length (now 512)" + LORA),
        ("train-dpo", {"micro_batch_size": 4}, "reference",
         "lower --micro-batch-size (now 4) or --max-length (now 512)"),
        ("train-sft", {"micro_batch_size": 1, "max_length": 300}, "",
         "lower --max-length (now 300), or use --gradient-checkpointing" + LORA),
        ("train-dpo", {"gradient_accumulation": 4, "gradient_checkpointing": True}, "",
         "lower --max-length (now 512), or raise --gradient-accumulation (now 4)" + LORA),
        ("train-dpo", {"gradient_accumulation": 4, "gradient_checkpointing": True, "lora_r": 8}, "",
         "lower --max-length (now 512), or raise --gradient-accumulation (now 4)"),
        ("train-dpo", {"micro_batch_size": 4}, "evaluating",
         "lower --eval-batch-size (now 8) or --max-length (now 512)"),
        ("train-dpo", {}, "loading", "free memory, or use a smaller model"),
        ("train-dpo", {}, "reading", "free memory, or use fewer or shorter rows"),
        ("estimate", {}, "", "lower --batch-size (now 16) or --max-length (now 512), or use --sequential"),
        ("estimate", {"sequential": True, "batch_size": 1}, "", "lower --max-length (now 512)"),
        ("estimate", {}, "loading", "use --sequential, or free memory, or use a smaller model"),
        ("estimate", {"sequential": True}, "loading", "free memory, or use a smaller model"),
        ("evaluate", {}, "generating", "lower --batch-size (now 16) or --max-new-tokens (now 128)"),
        ("evaluate", {"batch_size": 2}, "", "lower --batch-size (now 2) or --max-length (now 512)"),
        ("inspect-weights", {}, "", "free memory, or use fewer rows"),
    ],
)  # fmt: skip
def test_the_advice_is_about_settings_in_force(command: str, given: dict, activity: str, expected: str) -> None:
    shown, _, again = advice(command, activity, **given).partition("; ")
    assert shown == expected
    pass_of_an_output = command in ("train-dpo", "train-sft", "estimate") and activity not in ("loading", "reading")
    assert again == ("changed settings need --overwrite" if pass_of_an_output else "")
    known = {f"--{path.rpartition('.')[2].replace('_', '-')}" for path in _paths(command)}
    assert set(re.findall(r"--[\w-]+", expected)) <= known


def _paths(command: str) -> list[str]:
    settings = load(COMMANDS[command].settings, GIVEN[command], environ={}).settings
    return [path for path, _, _ in settings.leaves()]


def test_one_model_under_two_prompts_is_loaded_once() -> None:
    settings = load(COMMANDS["estimate"].settings, {"model": "m", "dataset": "d", "output_dir": "o"}).settings
    assert "sequential" not in memory_advice(settings, "") + memory_advice(settings, "loading")


def test_a_stage_of_the_pipeline_is_advised_by_names_of_its_file() -> None:
    expected = "lower train.micro_batch_size (now 2) or max_length (now 512), or use train.gradient_checkpointing"
    assert advice("train-dpo", stage="train", micro_batch_size=2).startswith(expected)


@EVERY
def test_every_kind_of_it_is_recognized_and_named_once(error: Exception) -> None:
    assert is_out_of_memory(error)
    settings = load(COMMANDS["train-dpo"].settings, GIVEN["train-dpo"], environ={}).settings
    with (
        pytest.raises(OutOfMemory, match=r"^m: out of memory: the model does not fit; free memory, or") as caught,
        explaining_out_of_memory(settings, "train"),
        explaining_out_of_memory(settings),
        naming_out_of_memory("evaluating"),
        naming_out_of_memory("loading", "m"),
    ):
        raise error
    assert caught.value.exit_code == 1
    assert "train." not in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("memory"), OSError(28, "No space left on device"), KeyError("x")])
def test_other_errors_pass(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), naming_out_of_memory("loading"):
        raise error


# ---------------------------------------------------------------- in the program


def assert_out_of_memory(done: Done, *words: str) -> None:
    assert (done.code, done.out) == (1, ""), done.err
    assert done.error.startswith("error: ")
    assert len(done.error) <= 300
    assert "Traceback" not in done.err
    assert all(word in done.error for word in ("out of memory", *words)), done.error
    assert "copy it again" not in done.error
    assert "bug" not in done.error


def train_dpo(world: Path, out: Path, *more: str | Path) -> list[str | Path]:
    short = ("--max-steps", "2", "--batch-size", "4", "--warmup-steps", "0", "--no-ref-cache")
    return ["train-dpo", "-m", world / "sft", "-d", world / "data", "-o", out, *short, *more]


def failing(monkeypatch: pytest.MonkeyPatch, target: str, error: Exception, after: int = 0) -> None:
    """Let a function raise an error from some call on."""
    module, _, name = target.rpartition(":")
    owner = pytest.importorskip(f"tisdpo_cli.{module}")
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), [0]

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, last, fail)


@EVERY
def test_while_a_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    where = str(world / "sft")
    assert_out_of_memory(run_here(*train_dpo(world, tmp_path / "out")), where, "does not fit", "smaller model")
    done = run_here(
        "estimate", "--forward", world / "sft", "--reverse", world / "sft", "-d", world / "data",
        "-o", tmp_path / "scored",
    )  # fmt: skip
    assert_out_of_memory(done, str(world / "sft"), "does not fit", "--sequential")
    assert not list(tmp_path.rglob("run.json"))


def test_while_a_model_is_moved(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "model.loading:nn.Module.to", ERRORS[1])
    done = run_here(*train_dpo(world, tmp_path / "out"))
    assert_out_of_memory(done, str(world / "sft"), "does not fit")


@pytest.mark.parametrize(
    ("target", "after", "words"),
    [
        ("engine.training.reference:score", 0, ["reference log-probs", "--micro-batch-size (now 2)"]),
        ("engine.training.trainer:Trainer._backward", 0, ["--micro-batch-size (now 2)", "--gradient-checkpointing"]),
        ("engine.training.trainer:Trainer._sums", 0, ["while evaluating", "--eval-batch-size (now 8)"]),
        ("data.tokenizing:encode_pairs", 0, ["reading the dataset", "fewer or shorter rows"]),
        ("model.layout:collate", 0, ["--micro-batch-size (now 2)"]),
    ],
    ids=["reference", "training", "evaluating", "tokenizing", "probe"],
)
def test_in_a_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, after: int, words: list[str]
) -> None:
    # Where nothing is known of the dataset.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    failing(monkeypatch, target, ERRORS[2], after)
    done = run_here(*train_dpo(world, tmp_path / "out", "--micro-batch-size", "2"))
    assert_out_of_memory(done, *words)
    assert not (tmp_path / "out" / "run.json").exists()


def test_while_parquet_is_read(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(pair_rows(3)), path)
    failing(monkeypatch, "data.table_rows:_numbered_rows", pa.ArrowMemoryError("malloc of size 64 failed"))
    done = run_here("train-dpo", "-m", world / "sft", "-d", path, "-o", tmp_path / "out")
    assert_out_of_memory(done, f"error: {path}: out of memory while reading the dataset")


def test_in_evaluate(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "engine.evaluation.policies:sample", ERRORS[1])
    done = run_here(
        "evaluate", "-m", world / "sft", "--ref-model", world / "sft", "-d", world / "data", "--eval-pairs", "2",
        "--sample-prompts", "1",
    )  # fmt: skip
    assert_out_of_memory(done, "while generating", "--batch-size (now 16)", "--max-new-tokens (now 128)")


def test_in_a_stage_of_the_pipeline(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "engine.training.trainer:Trainer._backward", MemoryError())
    done = run_here("run", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", "--max-steps", "1")
    assert_out_of_memory(done, "lower train_dpo.tokens_per_microbatch", "use train_dpo.gradient_checkpointing")
