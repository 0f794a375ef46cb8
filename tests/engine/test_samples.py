"""Samples while training: what the model would answer, and nothing of the training changes for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_jsonl
from processes import run_jobs
from test_resume import assert_same, stop_after, train
from test_training_commands import run
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLED: dict[str, Any] = {"sample_every": 3, "sample_prompts": 3, "sample_tokens": 12}


def samples(out: Path) -> list[dict[str, Any]]:
    return read_jsonl(out / "samples.jsonl")


@pytest.fixture(scope="module")
def sampled(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("sampled") / "out"
    train(world, out, **SAMPLED)
    return out


def test_the_training_is_the_same_without_samples(world: Path, sampled: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "out")
    assert_same(tmp_path / "out", sampled)
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def generated(model: Path, prompt: str) -> str:
    """What transformers generates, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    policy = AutoModelForCausalLM.from_pretrained(model)
    out = policy.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    tokens = out[0, ids.shape[1] :].tolist()
    ends = [i for i, token in enumerate(tokens) if token == tokenizer.eos_token_id]
    return tokenizer.decode(tokens[: ends[0]] if ends else tokens)


def test_samples_are_what_transformers_generates(world: Path, sampled: Path) -> None:
    rows = samples(sampled)
    assert [row["step"] for row in rows] == [step for step in (0, 3, 6, 8) for _ in range(3)]
    assert {row["role"] for row in rows if row["step"] == 0} == {"reference"}
    assert {row["role"] for row in rows if row["step"]} == {"policy"}
    assert len({row["prompt"] for row in rows}) == 3
    for row in rows:
        assert "test.jsonl:" in row["where"]
        if row["step"] in (0, 8):
            assert row["response"] == generated(world / "sft" if row["step"] == 0 else sampled, row["prompt"])


@pytest.mark.parametrize("after", [3, 4])
def test_a_resumed_run_writes_the_same_samples(world: Path, sampled: Path, tmp_path: Path, after: int) -> None:
    stop_after(world, tmp_path / "out", after, **SAMPLED)
    train(world, tmp_path / "out", **SAMPLED)
    assert_same(tmp_path / "out", sampled)
    assert samples(tmp_path / "out") == samples(sampled)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "layout": "separate"},
        {"gradient_checkpointing": True},
        {"lora_r": 4, "lora_dropout": 0.3, "learning_rate": 1e-2},
        {"dtype": "bf16", "sample_temperature": 1.0},
        {"alpha": 0.5},
    ],
    ids=str,
)
def test_no_way_of_training_minds_samples(world: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    short = {"max_steps": 4, **settings}
    for name, more in (("with", SAMPLED), ("again", SAMPLED), ("without", {})):
        chosen = {key: value for key, value in short.items() if more or not key.startswith("sample_")}
        train(world, tmp_path / name, **chosen, **more)
    file = "adapter_model.safetensors" if "lora_r" in settings else "model.safetensors"
    assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    assert samples(tmp_path / "with") == samples(tmp_path / "again")


def test_recomputing_activations_gives_the_same_samples(world: Path, sampled: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "out", gradient_checkpointing=True, **SAMPLED)
    assert [row["response"] for row in samples(tmp_path / "out")[:3]] == [
        row["response"] for row in samples(sampled)[:3]
    ]


def test_another_reference_is_not_the_policy_before_training(world: Path, sampled: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "out", ref_model=sampled, max_steps=1, **SAMPLED)
    assert {row["role"] for row in samples(tmp_path / "out")} == {"policy"}


def test_fine_tuning_is_sampled_too(world: Path, tmp_path: Path) -> None:
    run("train-sft", world, tmp_path / "out", **SAMPLED)
    rows = samples(tmp_path / "out")
    assert [row["step"] for row in rows] == [step for step in (0, 3, 5) for _ in range(3)]
    assert rows[-1]["response"] == generated(tmp_path / "out", rows[-1]["prompt"])


@pytest.mark.slow
def test_the_first_of_several_processes_samples(world: Path, tmp_path: Path) -> None:
    given = {"model": world / "sft", "dataset": world / "data", "batch_size": 8, "max_steps": 4, "warmup_steps": 0}
    run_jobs(2, [("train-dpo", {**given, "output_dir": tmp_path / "out", **SAMPLED})], tmp_path)
    assert [row["step"] for row in samples(tmp_path / "out")] == [step for step in (0, 3, 4) for _ in range(3)]
