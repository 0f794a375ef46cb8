"""One and the same set of files is hashed, checked and loaded, and nothing in it is left out silently."""

from __future__ import annotations

import json
import shutil
import struct
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_loading import NORM, WEIGHTS, attempt, change_json, change_weights, model, refused  # noqa: F401

from tisdpo_cli.errors import ModelError, OutOfMemory, UsageError
from tisdpo_cli.model.content_hashes import hash_model
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.model.loading import load_model, save_model, take_notes
from tisdpo_cli.model.randomness import disable_randomness
from tisdpo_cli.model.tokenizer import load_tokenizer


def locate_error(path, **kwargs):
    with pytest.raises((ModelError, UsageError)) as caught:
        locate_model(str(path), "--model", **kwargs)
    return caught.value.exit_code, str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_a_whole_model_is_refused(refused, model, name):  # noqa: F811
    (model / name).write_text("{}")
    code, message = refused(model)
    assert code == 1
    assert "adapter" in message
    assert name in message


def test_a_stale_index_is_neither_hashed_nor_loaded(model):  # noqa: F811
    shard = "model-00001-of-00001.safetensors"
    shutil.copy(model / WEIGHTS, model / shard)
    names = load_file(model / WEIGHTS)
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    before, loaded = hash_model(model), load_model(model).state_dict()[NORM].clone()
    change_weights(model, lambda t: t[NORM].add_(1))
    assert hash_model(model) != before
    assert not torch.equal(load_model(model).state_dict()[NORM], loaded)
    (model / shard).write_bytes(b"")
    assert locate_model(str(model), "--model") == model


def test_an_index_names_files_of_the_model_only(model):  # noqa: F811
    shutil.copy(model / WEIGHTS, model.parent / "other.safetensors")
    (model / WEIGHTS).unlink()
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {NORM: "../other.safetensors"}}))
    code, message = locate_error(model)
    assert code == 1
    assert "outside the model" in message


def test_more_layers_in_the_weights_than_in_the_configuration_are_refused(refused, model):  # noqa: F811
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    change_json(model / "config.json", num_hidden_layers=layers - 1, layer_types=...)
    code, message = refused(model)
    assert code == 1
    assert f"model.layers.{layers - 1}." in message
    assert "12 tensors" in message


@pytest.mark.parametrize("name", ["lm_head2.weight", "score.weight", "model.layers.0.self_attn.extra.weight"])
def test_a_tensor_without_a_place_in_the_model_is_named(refused, model, name):  # noqa: F811
    change_weights(model, lambda t: t.update({name: torch.ones(3)}))
    code, message = refused(model)
    assert code == 1
    assert name in message


@pytest.mark.parametrize(
    "name",
    [
        "v_head.summary.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.attn.masked_bias",
        "model.layers.1.attn.bias",
    ],
)
def test_harmless_tensors_are_named_in_a_note(attempt, model, name):  # noqa: F811
    change_weights(model, lambda t: t.update({name: torch.ones(3)}))
    assert f"ignoring tensors of the weights that the model does not use: {name}" in attempt(model)


def test_what_an_architecture_ignores_is_named_too(tmp_path):
    config = transformers.DeepseekV3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        v_head_dim=8, qk_nope_head_dim=4, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda t: t.update({"model.layers.61.embed_tokens.weight": torch.ones(3)}))
    assert "model.layers.61.embed_tokens.weight" in " ".join(take_notes(load_model(tmp_path)))


def test_code_of_a_model_is_part_of_its_hash(model):  # noqa: F811
    (model / "helper.py").write_text("a = 1")
    change_json(model / "config.json")
    plain = hash_model(model)
    change_json(model / "config.json", auto_map={"AutoModelForCausalLM": "code.M"})
    coded = hash_model(model)
    (model / "helper.py").write_text("a = 2")
    assert hash_model(model) != coded
    change_json(model / "config.json", auto_map=...)
    assert hash_model(model) == plain, "files that are not read change nothing"


def nested(depth):
    return '{"a": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_deep_nesting_is_refused_with_the_name_of_the_file(refused, model, name):  # noqa: F811
    (model / name).write_text(nested(100_000))
    code, message = refused(model)
    assert code == 1
    assert str(model / name) in message


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json"])
@pytest.mark.parametrize("content", [nested(100_000), "{", "[]"], ids=["deep", "torn", "list"])
def test_a_damaged_file_of_the_tokenizer_is_named(refused, model, name, content):  # noqa: F811
    (model / name).write_text(content)
    code, message = refused(model)
    assert code == 1
    assert message.startswith(str(model / name))


def test_a_deeply_nested_index_or_header_is_refused_with_the_name_of_the_file(refused, model):  # noqa: F811
    header = nested(100_000).encode()
    (model / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    assert str(model / WEIGHTS) in refused(model)[1]
    (model / WEIGHTS).unlink()
    (model / f"{WEIGHTS}.index.json").write_text(nested(100_000))
    assert f"{WEIGHTS}.index.json" in refused(model)[1]


def test_a_header_beyond_the_format_is_refused_at_once(model):  # noqa: F811
    with (model / WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", 3 * 2**30))
        stream.truncate(3 * 2**30 + 8)
    began = time.monotonic()
    code, message = locate_error(model)
    assert code == 1
    assert WEIGHTS in message
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "change",
    [
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": {"": "sdpa", "text_config": "a/b"}},
        {"text_config": {"_attn_implementation_internal": "a/b"}},
        {"_experts_implementation": "a/b"},
    ],
)
def test_code_from_elsewhere_needs_leave(model, change):  # noqa: F811
    change_json(model / "config.json", **change)
    code, message = locate_error(model)
    assert code == 2
    assert "--trust-remote-code" in message
    assert locate_model(str(model), "--model", trust_remote_code=True) == model


@pytest.mark.parametrize("asked", ["eager", "flex_attention", "flash_attention_2"])
def test_the_attention_is_chosen_here(model, asked):  # noqa: F811
    change_json(model / "config.json", _attn_implementation=asked, attn_implementation=asked)
    assert load_model(model).config._attn_implementation == "sdpa"


def test_a_model_without_sdpa_gets_eager_attention(tmp_path):
    config = transformers.GPTNeoConfig(
        vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(tmp_path).config._attn_implementation == "eager"


def test_quantized_weights_are_refused(refused, model):  # noqa: F811
    change_json(model / "config.json", quantization_config={"quant_method": "mxfp4"})
    code, message = refused(model)
    assert code == 1
    assert "quantized" in message


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_running_out_of_memory_is_not_blamed_on_the_files(monkeypatch, model, error):  # noqa: F811
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(OutOfMemory, match=f"{model}: out of memory: the model does not fit"):
        load_model(model)


def test_a_tied_configuration_with_its_own_head_is_saved_as_every_loader_reads_it(model, tmp_path):  # noqa: F811
    assert json.loads((model / "config.json").read_text())["tie_word_embeddings"]
    tensors = load_file(model / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=generator)
    save_file({**tensors, "lm_head.weight": head}, model / WEIGHTS, metadata={"format": "pt"})
    loaded = load_model(model)
    assert any("head of its own" in note for note in take_notes(loaded))
    assert take_notes(loaded) == []
    ids = torch.arange(1, 9)[None]
    expected = loaded(input_ids=ids).logits
    out = tmp_path / "saved"
    save_model(loaded, load_tokenizer(model), out)
    saved = json.loads((out / "config.json").read_text())
    assert saved["tie_word_embeddings"] is False
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(again(input_ids=ids).logits, expected)
    # A loader that follows the configuration alone.
    bare = type(again)(transformers.AutoConfig.from_pretrained(out))
    bare.load_state_dict(load_file(out / WEIGHTS))
    assert torch.equal(bare.eval()(input_ids=ids).logits, expected)


def test_a_head_equal_to_the_embedding_stays_tied(model):  # noqa: F811
    change_weights(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = load_model(model)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert take_notes(loaded) == []


def test_noise_of_every_kind_is_off_and_saved_as_it_was(model, tmp_path):  # noqa: F811
    rates = {"attention_dropout": 0.1, "router_jitter_noise": 0.01, "input_jitter_noise": 0.2, "layerdrop": 0.3}
    change_json(model / "config.json", **rates)
    loaded = load_model(model)
    assert {name: getattr(loaded.config, name) for name in rates} == dict.fromkeys(rates, 0.0)
    save_model(loaded, load_tokenizer(model), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: saved[name] for name in rates} == rates
    assert loaded.config.layerdrop == 0


def test_noise_in_nested_configurations_is_off():
    config = transformers.Gemma3Config(text_config={"attention_dropout": 0.5})
    disable_randomness(config)
    assert config.text_config.attention_dropout == 0
