"""A response ends at every id that the model or its tokenizer names, and trainings say which one they teach."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, run_here
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from tisdpo_cli.engine.evaluation.sampling import Sampling, sample_all, uniform_draws
from tisdpo_cli.model.end_tokens import end_ids
from tisdpo_cli.model.tokenizer import load_tokenizer


@pytest.fixture
def model(world: Path, tmp_path: Path) -> Path:
    """A copy of the world's starting model."""
    return Path(shutil.copytree(world / "sft", tmp_path / "model"))


def set_ends(model: Path, ids: object) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ids}))


def test_a_response_ends_at_any_of_the_ids_and_keeps_the_one_that_came() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    toy = LlamaForCausalLM(config).eval()
    draws = uniform_draws(0, [(0, k) for k in range(200)], 6)
    samples = sample_all(toy, [[1, 2]] * 200, draws, Sampling({0, 3}, 0, 6), 64)
    assert {sample.end for sample in samples} == {0, 3, None}
    for sample in samples:
        assert not {0, 3} & set(sample.ids)
        assert sample.scored == (sample.ids if sample.end is None else [*sample.ids, sample.end])
        assert sample.ended == (sample.end is not None)
        assert sample.ended or len(sample.ids) == 6


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 1, 3]}, {}, [1, 3]),
        ({"eos_token_id": 7}, {"eos_token_id": 2}, [7]),
        ({}, {"eos_token_id": 2}, []),
        (None, {"eos_token_id": [2, 5]}, [2, 5]),
        (None, {"text_config": {"eos_token_id": 4}}, [4]),
        (None, {}, []),
        ({"eos_token_id": [True, -1, "x", 2]}, {}, [2]),
    ],
)
def test_the_ids_come_from_the_generation_config(tmp_path: Path, generation, config, expected) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert end_ids(tmp_path) == expected


def test_evaluate_ends_responses_where_the_model_does(world: Path, model: Path, tmp_path: Path) -> None:
    def evaluated() -> tuple[dict, list[str]]:
        done = run_here(
            "evaluate", "-m", model, "--ref-model", world / "sft", "-d", world / "data", "--temperature", "0",
            "--sample-prompts", "4", "--max-new-tokens", "12", "--samples", tmp_path / "samples.jsonl", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        return json.loads(done.out)["policies"][0]["samples"], [
            row["responses"][0]["response"] for row in read_jsonl(tmp_path / "samples.jsonl")
        ]

    tokenizer = load_tokenizer(model)
    before, texts = evaluated()
    assert before["ended"] < 1
    first = {tokenizer.texts.encode([text])[0][0] for text in texts if text}
    set_ends(model, [*first, tokenizer.eos])
    after, texts = evaluated()
    assert after["ended"] == 1
    assert after["length"] == 0
    assert set(texts) == {""}


def test_trainings_say_which_end_they_teach_where_the_model_has_others(world: Path, model: Path) -> None:
    tokenizer = load_tokenizer(model)

    def notes(command: str) -> str:
        done = run_here(command, "-m", model, "-d", world / "data", "-o", model.parent / "out", "--dry-run")
        assert done.code == 0, done.err
        return " ".join(done.err.split())

    for command in ("train-dpo", "train-reverse", "train-sft"):
        set_ends(model, tokenizer.eos)
        assert "training teaches" not in notes(command)
        set_ends(model, [tokenizer.eos])
        assert "training teaches" not in notes(command)
        set_ends(model, [5, tokenizer.eos])
        taught = f"training teaches '<|endoftext|>' (id {tokenizer.eos}) as the end of a response"
        assert taught in notes(command)
        assert "also names" in notes(command)
        set_ends(model, 100_000)
        assert f"{taught}; the model's generation_config names id 100000" in notes(command)
        set_ends(model, None)
        assert f"{taught}; the model's generation_config names none" in notes(command)


def test_responses_across_a_change_of_the_positions_are_refused(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "longrope"
    shutil.copytree(world / "sft", model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [5.0] * 4}
    config = Phi3Config(
        vocab_size=json.loads((world / "sft" / "config.json").read_text())["vocab_size"], hidden_size=32,
        intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
        max_position_embeddings=2048, original_max_position_embeddings=64,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(model)

    def evaluate(new_tokens: int) -> tuple[int, str]:
        done = run_here(
            "evaluate", "-m", model, "--ref-model", model, "-d", world / "data", "--sample-prompts", "2",
            "--max-new-tokens", str(new_tokens),
        )  # fmt: skip
        return done.code, done.error

    code, error = evaluate(60)
    assert code == 2
    assert "64 tokens" in error
    assert evaluate(16)[0] == 0
