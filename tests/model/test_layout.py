"""Packed rows with shared prompts compute what rows of their own do, by family; where they cannot, it is seen."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
import transformers
from conftest import Listener, read_jsonl, run_here
from test_logprobs import EOS, FAMILIES, GRADIENT_BOUND, LOGP_BOUND, random_model

from tisdpo_cli.errors import ModelError
from tisdpo_cli.model import packed_attention as attention
from tisdpo_cli.model.batch import collate
from tisdpo_cli.model.layout import make_scorer
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.model.packed_attention import AttentionSpec, PackedLayout, segment_attention

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# What goes around replaced attention, has positions of its own kind, or reads the row as a sequence.
OTHERS = {
    "bloom, ALiBi": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(**TINY),
    "mamba, recurrent": lambda: transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "gpt-neo, windows of its own": lambda: transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    "stablelm": lambda: transformers.StableLmConfig(**TINY, intermediate_size=64, num_key_value_heads=4),
    "llama4, chunks": lambda: transformers.Llama4TextConfig(
        **TINY, intermediate_size=64, intermediate_size_mlp=64, num_key_value_heads=2, head_dim=8, num_local_experts=2,
        attention_chunk_size=8, no_rope_layers=[1, 1], interleave_moe_layer_step=1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def groups():
    """Prompts with two responses each, of many lengths, some beyond the window of 4."""
    draw = random.Random(5)
    lengths = [(1, 1, 9), (3, 2, 2), (12, 5, 1), (2, 14, 6), (7, 1, 1), (5, 6, 11)]
    return [
        ([draw.randrange(EOS) for _ in range(p)], [[draw.randrange(EOS) for _ in range(n)] for n in both])
        for p, *both in lengths
    ]


def scored(model, layout, groups, longest=64):
    scorer = make_scorer(model, layout, None, longest, Listener().note, "model")
    batch = collate(groups, 0, scorer.packed)
    return scorer, batch, scorer(batch)


def gradients(model, values):
    model.zero_grad(set_to_none=True)
    (values * torch.cos(torch.arange(len(values)))).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_separate_rows(family, groups):
    apart, packed = random_model(family), random_model(family)
    _, rows, expected = scored(apart, "separate", groups)
    scorer, batch, got = scored(packed, "auto", groups)
    assert scorer.packed
    assert torch.equal(batch.targets, rows.targets)
    assert torch.equal(batch.response_ids, rows.response_ids)
    assert batch.real_tokens < rows.real_tokens
    assert batch.input_ids.shape == (1, batch.real_tokens)
    assert (got - expected).abs().max() <= LOGP_BOUND
    a, b = gradients(packed, got), gradients(apart, expected)
    assert (a - b).norm() <= GRADIENT_BOUND * b.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_packed_together_and_in_which_order_changes_nothing(family, groups):
    model = random_model(family)
    with torch.no_grad():
        scorer, batch, together = scored(model, "shared-prefix", groups)
        for k, group in enumerate(groups):
            alone = scorer(collate([group], 0, packed=True))
            own = torch.cat([together[batch.response_ids == k], together[batch.response_ids == len(groups) + k]])
            assert (alone - own).abs().max() <= LOGP_BOUND
        backwards = collate(groups[::-1], 0, packed=True)
        turned = scorer(backwards)
        for k in range(len(groups)):
            there = turned[backwards.response_ids == len(groups) - 1 - k]
            assert (there - together[batch.response_ids == k]).abs().max() <= LOGP_BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_no_response_sees_another(family, groups):
    """To the bit: other tokens in all chosen responses, and rejected ones keep their log-probs; and the other way."""
    model = random_model(family)
    with torch.no_grad():
        scorer, batch, before = scored(model, "shared-prefix", groups)
        for side in (0, 1):
            other = [
                (p, [[(t + 1) % EOS for t in r] if k == side else r for k, r in enumerate(both)]) for p, both in groups
            ]
            after = scorer(collate(other, 0, packed=True))
            kept = (batch.response_ids < len(groups)) == (side == 1)
            assert torch.equal(before[kept], after[kept])
            assert not torch.equal(before[~kept], after[~kept])


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_cannot_are_read_in_rows_of_their_own(name, groups):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(OTHERS[name]()).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    heard = Listener()
    before = model.config._attn_implementation
    scorer = make_scorer(model, "auto", None, 64, heard.note, "the model")
    assert not scorer.packed
    assert "cannot share prompts between responses" in heard.said[0]
    assert model.config._attn_implementation == before
    assert scorer(collate(groups, 0, packed=False)).isfinite().all()
    with pytest.raises(ModelError, match="cannot share prompts"):
        make_scorer(model, "shared-prefix", None, 64, heard.note, "the model")


def test_a_model_that_computes_something_else_is_found_by_its_numbers():
    """It takes part in everything, but counts positions by slot."""
    model = random_model("llama")
    body = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **more: body(*args, **more)
    heard = Listener()
    assert not make_scorer(model, "auto", None, 64, heard.note, "m").packed
    assert "would differ by" in heard.said[0] or "attend to each other" in heard.said[0]


def attention_by_hand(query, key, value, lengths, scaling, window, softcap):
    """Softmax over what each position may see, position by position, in float64."""
    response_ids, place = [], []
    for group, (prompt, responses) in enumerate(lengths):
        response_ids += [(group, None)] * prompt
        place += range(prompt)
        for number, length in enumerate(responses):
            response_ids += [(group, number)] * length
            place += range(prompt, prompt + length)
    rows = []
    for t, ((group, number), position) in enumerate(zip(response_ids, place, strict=True)):
        seen = [
            s for s, ((g, n), p) in enumerate(zip(response_ids, place, strict=True))
            if g == group and n in (None, number) and p <= position and (window is None or position - p < window)
        ]  # fmt: skip
        for head in range(query.shape[1]):
            kv = head * key.shape[1] // query.shape[1]
            scores = key[0, kv, seen] @ query[0, head, t] * scaling
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            rows.append(scores.softmax(0) @ value[0, kv, seen])
    return torch.stack(rows).view(1, -1, query.shape[1], value.shape[-1]).transpose(1, 2)


LENGTHS = ((3, (4, 2)), (1, (1, 5)), (6, (2,)), (2, (3, 1, 4)))


def random_heads(key_heads):
    generator = torch.Generator().manual_seed(1)
    total = sum(prompt + sum(responses) for prompt, responses in LENGTHS)
    shapes = ((4, total, 8), (key_heads, total, 8), (key_heads, total, 6))
    return [torch.randn(1, *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [2, 128])
def test_attention_by_hand(monkeypatch, window, softcap, key_heads, block):
    monkeypatch.setattr(attention, "_BLOCK", block)
    heads, by_hand = random_heads(key_heads), random_heads(key_heads)
    groups = PackedLayout(LENGTHS)
    got = attention._InBlocks.apply(*heads, groups, AttentionSpec(0.4, window, softcap))
    expected = attention_by_hand(*by_hand, LENGTHS, 0.4, window, softcap)
    assert torch.allclose(got, expected, atol=1e-12)
    for values in (got, expected):
        (values * torch.arange(values.numel()).view(values.shape).cos()).sum().backward()
    for ours, theirs in zip(heads, by_hand, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_fused_kernel_agrees(window, key_heads):
    heads = random_heads(key_heads)
    groups = PackedLayout(LENGTHS)
    got = segment_attention(*heads, groups, AttentionSpec(0.4, window))
    assert groups.calls == 1
    assert torch.allclose(got, attention_by_hand(*heads, LENGTHS, 0.4, window, None), atol=1e-12)


def test_packed_worked_example():
    """Prompt 5 6, responses 7 8 and 9; then prompt 1, responses 2 and 3 4."""
    batch = collate([([5, 6], [[7, 8], [9]]), ([1], [[2], [3, 4]])], 0, packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    # The last prompt token predicts the first token of both responses.
    assert batch.positions.tolist() == [1, 2, 5, 1, 5, 7]
    assert batch.targets.tolist() == [7, 8, 2, 9, 3, 4]
    assert batch.response_ids.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.real_tokens == 9


def test_an_empty_response_and_single_responses_can_be_packed():
    batch = collate([([1, 2], [[], [3]])], 0, packed=True)
    assert (batch.positions.tolist(), batch.response_ids.tolist()) == ([1], [1])
    single = collate([([1], [[2, 3]]), ([4, 5], [[6]])], 0, packed=True)
    assert (single.positions.tolist(), single.targets.tolist()) == ([0, 1, 4], [2, 3, 6])
    model = random_model("llama")
    scorer = make_scorer(model, "shared-prefix", None, 16, Listener().note, "m")
    assert scorer(batch).shape == (1,)
    assert scorer(single).shape == (3,)


def test_gradient_checkpointing_of_packed_rows_changes_nothing(groups):
    found = []
    for checkpointing in (False, True):
        model = random_model("qwen3").train()
        scorer, batch, values = scored(model, "shared-prefix", groups)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            values = scorer(batch)
        found.append((values.detach(), gradients(model, values)))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).norm() <= GRADIENT_BOUND * found[0][1].norm()


@pytest.mark.parametrize("family", ["llama", "gemma2, soft caps", "phi, bias in the head", "gpt-neox"])
def test_the_feed_forward_of_the_last_layer_sees_scored_positions_only(family, groups):
    model, seen = random_model(family), []
    layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    scorer = make_scorer(model, "auto", None, 64, Listener().note, "model")
    for layer in (layers[0], layers[-1]):
        layer.mlp.register_forward_hook(lambda _mlp, inputs, _made: seen.append(inputs[0].shape[1]))
    batch = collate(groups, 0, scorer.packed)
    scorer(batch)
    assert seen == [batch.real_tokens, len(batch.targets)]


def test_a_last_layer_whose_positions_are_needed_after_it_is_left_whole(groups):
    """Here the embeddings are added once more behind it: packed rows compute that, chosen positions alone do not."""
    found = []
    for layout in ("separate", "auto"):
        model, seen, embedded = random_model("llama"), [], []
        model.model.embed_tokens.register_forward_hook(lambda _m, _in, made, kept=embedded: kept.append(made))
        model.model.norm.register_forward_pre_hook(lambda _m, inputs, kept=embedded: (inputs[0] + kept[-1],))
        scorer = make_scorer(model, layout, None, 64, Listener().note, "model")
        model.model.layers[-1].mlp.register_forward_hook(lambda _m, inputs, _made, seen=seen: seen.append(inputs[0]))
        batch = collate(groups, 0, scorer.packed)
        found.append(scorer(batch))
    assert scorer.packed
    assert seen[0].shape[1] == batch.real_tokens
    assert (found[0] - found[1]).abs().max() <= LOGP_BOUND


def test_a_model_can_be_laid_out_again(groups):
    model = random_model("llama")
    first = make_scorer(model, "shared-prefix", None, 64, Listener().note, "m")(collate(groups, 0, packed=True))
    _, _, apart = scored(model, "separate", groups)
    assert (first - apart).abs().max() <= LOGP_BOUND
    again = make_scorer(model, "auto", None, 64, Listener().note, "m")
    assert again.packed
    assert torch.equal(again(collate(groups, 0, packed=True)), first)


@pytest.mark.parametrize("policy_packs", [True, False])
def test_distributions_of_a_model_that_packs_and_one_that_does_not_are_compared_apart(world, tmp_path, policy_packs):
    """Both read the same batches, so neither packs: metrics are those of `--layout separate`."""
    bloom = tmp_path / "bloom"
    shutil.copytree(world / "sft", bloom, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    ids = json.loads((world / "sft" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=ids, hidden_size=32, n_layer=2, n_head=4)
    transformers.BloomForCausalLM(config).save_pretrained(bloom)
    policy, reference = (world / "sft", bloom) if policy_packs else (bloom, world / "sft")
    curves = []
    for layout in ("auto", "separate"):
        out = tmp_path / layout
        done = run_here(
            "train-dpo", "-m", policy, "--ref-model", reference, "-d", world / "data", "-o", out, "--alpha", "0.5",
            "--max-steps", "2", "--batch-size", "8", "--warmup-steps", "0", "--layout", layout,
        )  # fmt: skip
        assert done.code == 0, done.err
        curves.append([[row["loss"], row["kl/chosen"]] for row in read_jsonl(out / "metrics.jsonl")])
        assert ("encoding each response separately in both models" in done.err) == (layout == "auto")
    assert curves[0] == curves[1]


def test_bf16_in_packed_rows_is_bf16_in_separate_ones(groups):
    values = []
    for layout in ("separate", "shared-prefix"):
        model = random_model("llama", initializer_range=0.1)
        scorer = make_scorer(model, layout, torch.bfloat16, 64, Listener().note, "m")
        assert isinstance(scorer, TokenScorer)
        values.append(scorer(collate(groups, 0, scorer.packed)).detach())
    assert values[0].dtype == torch.float32
    assert (values[0] - values[1]).abs().max() < 0.1


def test_both_layouts_train_alike(contrast, tmp_path):
    """Through the program: metrics of every update, and scores."""
    found = {}
    for layout in ("shared-prefix", "separate"):
        done = run_here(
            "train", "-m", contrast / "sft", "-d", contrast / "scored", "-o", tmp_path / layout, "--max-steps", "4",
            "--batch-size", "8", "--lr", "1e-3", "--warmup-steps", "0", "--layout", layout,
        )  # fmt: skip
        assert done.code == 0, done.err
        done = run_here(
            "estimate", "--forward", contrast / "dpo", "--reverse", contrast / "reverse", "-d", contrast / "data",
            "-o", tmp_path / f"scored-{layout}", "--layout", layout,
        )  # fmt: skip
        assert done.code == 0, done.err
        rows = read_jsonl(tmp_path / f"scored-{layout}" / "train.jsonl")
        found[layout] = read_jsonl(tmp_path / layout / "metrics.jsonl"), rows
    for one, other in zip(found["shared-prefix"][0], found["separate"][0], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-5)
    for one, other in zip(found["shared-prefix"][1], found["separate"][1], strict=True):
        for name in ("chosen_weight", "rejected_weight"):
            assert one[name] == pytest.approx(other[name], abs=2e-5)
