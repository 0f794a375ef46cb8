"""Sizes of models without their weights: the same as those of the models themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from tisdpo_cli.engine.training.fitting import with_adapter
from tisdpo_cli.model.adapters import LoraShape, attach_new
from tisdpo_cli.model.loading import load_model
from tisdpo_cli.model.shapes import ModelShape, file_bytes, measure, outline

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen2-tied": Qwen2Config(**GATED, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**GATED, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "mixtral": MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(
        **GATED, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, head_dim=8,
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def saved(family: str, tmp_path: Path) -> Path:
    """A random model on disk."""
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    return tmp_path


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


@EVERY
def test_an_outline_has_the_sizes_of_the_model(saved: Path) -> None:
    model, shape = load_model(saved), measure(outline(saved))
    assert shape == measure(model)
    assert (shape.trained, shape.frozen, shape.total) == (count(model), 0, count(model))
    # Files hold a tied tensor once, and a header.
    assert 4 * shape.total <= file_bytes(saved) < 4 * shape.total + 20_000


@EVERY
def test_parameters_are_counted_by_group(saved: Path, family: str) -> None:
    model, shape = load_model(saved), measure(outline(saved))
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    assert shape.body_trained == count(layers)
    assert shape.root == count(model) - count(layers)
    assert shape.largest_layer == max(map(count, layers))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family in ("qwen2-tied", "gpt2", "opt"))
    assert shape.root >= 96 * 32 * (1 if tied else 2)
    assert (shape.layers, shape.width, shape.vocabulary, shape.attention) == (3, 32, 96, 32)
    assert shape.trains_head


@EVERY
def test_a_token_passes_its_experts_only(saved: Path, family: str) -> None:
    shape = measure(outline(saved))
    config = FAMILIES[family]
    if family == "mixtral":
        unused = 3 * 2 * (3 * 32 * 48)
    elif family == "qwen3-moe":
        unused = 3 * 4 * (3 * 32 * 24)
    else:
        unused = 0
    assert shape.active == shape.body_trained - unused
    expected = {"gpt2": 128, "mixtral": 96, "qwen3-moe": 48}
    assert shape.feed_forward == expected.get(family, 48), config


@EVERY
@pytest.mark.parametrize(
    "adapter",
    [LoraShape(4, 8), LoraShape(2, 4, rslora=True, dora=True)],
    ids=["lora", "dora"],
)
def test_an_adapter_is_counted_as_peft_makes_it(saved: Path, family: str, adapter: LoraShape) -> None:
    if adapter.dora and family in ("mixtral", "qwen3-moe"):
        pytest.skip("peft has no DoRA of experts")
    base = measure(outline(saved))
    model, shape = load_model(saved), measure(outline(saved, adapter=adapter))
    attach_new(model, adapter, 0)
    assert shape == measure(model)
    assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.frozen == base.total
    assert not shape.trains_head
    guessed = with_adapter(base, adapter.r).trained
    if family in ("mixtral", "qwen3-moe"):
        # peft gives the two halves of an expert's first layer a rank each, and adapts the router too.
        assert shape.trained / 2 < guessed < shape.trained
    elif not adapter.dora:
        assert guessed == shape.trained


@pytest.mark.parametrize("family", ["qwen2-tied", "llama-untied"])
def test_a_head_that_is_saved_with_an_adapter_is_trained(saved: Path) -> None:
    shape = measure(outline(saved, adapter=LoraShape(4, 8, modules_to_save=("lm_head",))))
    assert shape.trains_head
    assert shape.root_trained == 96 * 32


@pytest.mark.parametrize("family", ["llama-untied"])
def test_what_4_bits_hold_is_the_linear_layers_inside(saved: Path) -> None:
    shape: ModelShape = measure(outline(saved, adapter=LoraShape(4, 8)))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert shape.linear == 3 * layer


@pytest.mark.parametrize("family", ["qwen2-tied"])
def test_an_adapter_on_disk_is_what_is_trained(saved: Path, tmp_path: Path) -> None:
    from tisdpo_cli.model.adapters import BaseModel, adapters_of

    model = load_model(saved)
    attach_new(model, LoraShape(4, 8), 0)
    directory = tmp_path / "adapter"
    directory.mkdir()
    adapters = adapters_of(model)
    assert adapters is not None
    adapters.save(directory, BaseModel(str(saved), "0" * 64))
    assert measure(outline(directory)) == measure(model)
    with torch.device("meta"):
        assert measure(outline(directory)).trained == 4 * measure(outline(saved)).features
