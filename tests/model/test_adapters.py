"""Adapters on models of four families: what they change, what they leave alone, and what is saved and merged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_layout import groups  # noqa: F401
from test_logprobs import random_model
from torch import nn

from tisdpo_cli.errors import ModelError, UsageError
from tisdpo_cli.model.adapters import (
    BaseModel,
    LoraShape,
    adapter_dropout,
    adapters_of,
    attach_new,
    attach_saved,
    refuse_unfaithful_merge,
    remove_adapter,
)
from tisdpo_cli.model.batch import collate
from tisdpo_cli.model.layout import make_scorer, probe_logps
from tisdpo_cli.model.loading import load_model
from tisdpo_cli.model.shared_models import SharedModels

FAMILIES = ["llama", "gemma2, soft caps", "phi, bias in the head", "gpt-neox"]
SHAPE = LoraShape(4, 8.0)


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with its adapter as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(family: str, shape: LoraShape = SHAPE) -> nn.Module:
    model = random_model(family).float()
    attach_new(model, shape, seed=0)
    return model


def scored(model: nn.Module, layout: str, groups):  # noqa: F811
    scorer = make_scorer(model, layout, None, 64, lambda _: None, "model")
    return scorer, scorer(collate(groups, 0, scorer.packed))


def saved(model: nn.Module, directory: Path, base: Path) -> Path:
    directory.mkdir(parents=True)
    adapters = adapters_of(model)
    assert adapters is not None
    adapters.save(directory, BaseModel(str(base), "unknown"))
    (directory / "base_model.json").unlink()
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    random_model("llama").float().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["shared-prefix", "separate"])
def test_a_new_adapter_and_one_that_is_off_change_no_bit(family, groups, layout) -> None:  # noqa: F811
    plain, (_, before) = random_model(family).float(), scored(random_model(family).float(), layout, groups)
    attach_new(plain, SHAPE, seed=0)
    scorer, new = scored(plain, layout, groups)
    assert torch.equal(before, new)
    filled(plain)
    assert float((scored(plain, layout, groups)[1] - before).detach().abs().max()) > 1e-3
    adapters = adapters_of(plain)
    with adapters.using(None):
        assert torch.equal(before, scored(plain, layout, groups)[1])
    assert adapters.active == scorer.adapter == "default"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "with the head"])
def test_log_probs_and_gradients_are_those_of_the_model_s_own_code(family, groups, targets) -> None:  # noqa: F811
    """Packed rows, a last layer that is cut short and a head in chunks see an adapter as plain forward passes do."""
    model = random_model(family).float()
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {head})
    attach_new(model, LoraShape(4, 8.0, targets=(*linear, head) if targets != "all-linear" else (targets,)), seed=0)
    filled(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert any(head in name for name in trained) == (targets != "all-linear")
    expected = torch.cat([
        model(input_ids=torch.tensor([[*prompt, *response]])).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
        .gather(1, torch.tensor(response)[:, None])[:, 0]
        for k in range(2) for prompt, responses in groups for response in [responses[k]]
    ])  # fmt: skip
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    scorer, values = scored(model, "shared-prefix", groups)
    assert scorer.packed
    assert values.detach() == pytest.approx(expected.detach(), abs=1e-5)
    values.sum().backward()
    for name, parameter in trained.items():
        assert parameter.grad == pytest.approx(gradients[name], abs=2e-4, rel=1e-3), name


def test_a_base_in_bf16_is_packed_like_one_in_float32(groups) -> None:  # noqa: F811
    """Layouts are told apart in float32, a part of the model at a time, which leaves the weights as they were."""
    model = random_model("llama").bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attach_new(model, SHAPE, seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    notes: list[str] = []
    scorer = make_scorer(model, "auto", torch.bfloat16, 64, notes.append, "model")
    assert (scorer.packed, notes, all(scorer.cut_short.values())) == (True, [], True)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])


SHAPES = {
    "lora": SHAPE,
    "rslora": LoraShape(4, 8.0, rslora=True),
    "dora": LoraShape(4, 8.0, dora=True),
    "modules to save": LoraShape(2, 4.0, targets=("q_proj", "v_proj"), modules_to_save=("norm",)),
}


def test_a_saved_adapter_is_loaded_alike_here_and_by_peft(base, tmp_path) -> None:
    ids, ours = torch.arange(2, 12)[None], []
    for name, shape in SHAPES.items():
        model = load_model(base)
        attach_new(model, shape, seed=0)
        path = saved(filled(model), tmp_path / name, base)
        assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert torch.equal(probe_logps(load_model(path)), probe_logps(model))
        ours += [model(input_ids=ids).logits.argmax(-1).tolist()] * 2
    script = (
        "import sys, torch; from peft import AutoPeftModelForCausalLM, PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "for path in sys.argv[2:]:\n"
        "    one = AutoPeftModelForCausalLM.from_pretrained(path)\n"
        "    two = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), path)\n"
        "    for m in (one, two): print(m(input_ids=torch.arange(2, 12)[None]).logits.argmax(-1).tolist())"
    )
    command = [sys.executable, "-c", script, str(base), *(str(tmp_path / name) for name in SHAPES)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in ran.stdout.splitlines()] == ours


def test_adapters_of_one_base_share_it(base, tmp_path, groups) -> None:  # noqa: F811
    """Scorers keep to their adapter, or to none, in whatever order they are used."""
    paths = [saved(filled(_fresh(base), seed), tmp_path / str(seed), base) for seed in (1, 2)]
    alone = [scored(load_model(path, trained=False), "shared-prefix", groups)[1] for path in (base, *paths)]
    shared = SharedModels(torch.device("cpu"), False)
    scorers = [scored(shared.load(path), "shared-prefix", groups)[0] for path in (paths[0], base, paths[1])]
    assert len({id(scorer.model) for scorer in scorers}) == 1
    batch = collate(groups, 0, packed=True)
    for scorer, expected in [(scorers[0], alone[1]), (scorers[2], alone[2]), (scorers[1], alone[0])] * 2:
        assert torch.equal(scorer(batch), expected)
    assert not any(p.requires_grad for p in scorers[0].model.parameters())


def _fresh(base: Path) -> nn.Module:
    model = load_model(base)
    attach_new(model, SHAPE, seed=0)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_is_the_same_model(family) -> None:
    model = filled(adapted(family))
    expected = probe_logps(model)
    merged = adapters_of(model).merge()
    assert probe_logps(merged) == pytest.approx(expected, abs=1e-5)
    assert adapters_of(merged) is None
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_shared_weights_is_not_merged(target) -> None:
    model = random_model("llama", tie_word_embeddings=True).float()
    attach_new(model, LoraShape(2, 4.0, targets=(target,)), seed=0)
    with pytest.raises(ModelError, match="share their weights"):
        refuse_unfaithful_merge(model, "adapter")
    untied = random_model("llama", tie_word_embeddings=False).float()
    attach_new(untied, LoraShape(2, 4.0, targets=(target,)), seed=0)
    refuse_unfaithful_merge(untied, "adapter")
    expected = probe_logps(filled(untied))
    assert probe_logps(adapters_of(untied).merge()) == pytest.approx(expected, abs=1e-5)


def test_dropout_is_on_within_its_context_only() -> None:
    model = filled(adapted("llama", LoraShape(4, 8.0, dropout=0.5)))
    ids = torch.arange(2, 12)[None]
    exact = model(input_ids=ids).logits
    with adapter_dropout(model, (0, 1)):
        first = model(input_ids=ids).logits
    with adapter_dropout(model, (0, 1)):
        again = model(input_ids=ids).logits
    with adapter_dropout(model, (0, 2)):
        other = model(input_ids=ids).logits
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, exact)
    assert torch.equal(model(input_ids=ids).logits, exact)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (LoraShape(4, 8.0, targets=("query",)), "its linear layers are"),
        (LoraShape(4, 8.0, modules_to_save=("score",)), "no module of this name"),
    ],
)
def test_layers_that_are_not_there_are_named(shape, sentence) -> None:
    with pytest.raises(UsageError, match="lora") as raised:
        attach_new(random_model("llama").float(), shape, seed=0)
    assert sentence in str(raised.value)


def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path) -> None:
    path = saved(filled(_fresh(base)), tmp_path / "adapter", base)
    from safetensors.torch import load_file, save_file

    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    faults = {
        "missing or too many": {name: t for name, t in tensors.items() if name != first},
        "does not fit": {**tensors, first: torch.zeros(3, 3)},
        "not finite": {**tensors, first: tensors[first] * float("nan")},
    }
    for sentence, faulty in faults.items():
        save_file(faulty, weights)
        with pytest.raises(ModelError, match=sentence):
            attach_saved(load_model(base), path, trained=False)


def test_without_peft_the_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'tisdpo\[peft\]'"):
        attach_new(random_model("llama").float(), SHAPE, seed=0)


def test_experts_in_bf16_are_laid_out_too() -> None:
    """Their adapter reads the weights of all experts before the experts run."""
    model = random_model("mixtral, experts").bfloat16()
    attach_new(model, SHAPE, seed=0)
    scorer = make_scorer(model, "auto", torch.bfloat16, 64, lambda _: None, "model")
    assert scorer.packed
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}


def test_an_embedding_of_another_class_is_no_adapter() -> None:
    """Gemma 3 has a class of its own for its tied embedding."""
    import transformers

    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    attach_new(model, LoraShape(2, 4.0, targets=("q_proj",)), seed=0)
    refuse_unfaithful_merge(filled(model), "adapter")
    expected = probe_logps(model)
    assert probe_logps(adapters_of(model).merge()) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_can_be_removed(base, tmp_path) -> None:
    paths = [saved(filled(_fresh(base), seed), tmp_path / str(seed), base) for seed in (1, 2)]
    shared = SharedModels(torch.device("cpu"), False)
    model = shared.load(base)
    alone = probe_logps(model)
    shared.load(paths[0])
    count = sum(p.numel() for p in model.parameters())
    second = shared.load(paths[1])
    remove_adapter(second, adapters_of(second).active)
    assert sum(p.numel() for p in model.parameters()) == count
    assert torch.equal(probe_logps(shared.load(base)), alone)
