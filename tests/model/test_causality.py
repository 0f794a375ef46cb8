"""Rows are scored as when alone, whatever shares their pass; what cannot be is refused by its numbers."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from conftest import Listener
from test_logprobs import FAMILIES, random_model

from tisdpo_cli.errors import ModelError
from tisdpo_cli.model import layout as layouts
from tisdpo_cli.model.batch import collate
from tisdpo_cli.model.layout import make_scorer, recompute_activations
from tisdpo_cli.model.loading import load_model
from tisdpo_cli.model.logprobs import TokenScorer, compare
from tisdpo_cli.model.row_lengths import LengthRule, length_rule

BOUND = 1e-4
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def scaled(model, factor=3.0):
    """Larger weights, so that attention and positions matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model.eval()


# ---------------------------------------------------------------- encoders

ENCODERS = {
    "bert": (transformers.BertLMHeadModel, transformers.BertConfig),
    "roberta": (transformers.RobertaForCausalLM, transformers.RobertaConfig),
    "electra": (transformers.ElectraForCausalLM, transformers.ElectraConfig),
    "roformer": (transformers.RoFormerForCausalLM, transformers.RoFormerConfig),
    "camembert": (transformers.CamembertForCausalLM, transformers.CamembertConfig),
    "xlm-roberta": (transformers.XLMRobertaForCausalLM, transformers.XLMRobertaConfig),
}


@pytest.mark.parametrize("layout", ["auto", "separate", "shared-prefix"])
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_bidirectional_encoder_is_refused(family, layout, factor):
    kind, config = ENCODERS[family]
    torch.manual_seed(0)
    model = scaled(kind(config(**TINY, pad_token_id=0)), factor)
    with pytest.raises(ModelError, match="not a causal language model") as caught:
        make_scorer(model, layout, None, 32, Listener().note, "the model")
    assert "the model" in str(caught.value)


def test_the_same_encoder_as_a_decoder_is_accepted():
    torch.manual_seed(0)
    model = scaled(transformers.BertLMHeadModel(transformers.BertConfig(**TINY, is_decoder=True)))
    make_scorer(model, "auto", None, 32, Listener().note, "m")


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_are_accepted_in_separate_rows(family):
    heard = Listener()
    make_scorer(random_model(family), "separate", None, 32, heard.note, "m")
    assert heard.said == []


# ---------------------------------------------------------------- positions that depend on the longest row

LIMIT = 64


def longrope():
    draw = random.Random(0)
    factors = {
        name: [round(draw.uniform(*span), 3) for _ in range(4)]
        for name, span in (("short_factor", (1, 1.5)), ("long_factor", (2, 20)))
    }
    config = transformers.Phi3Config(
        **TINY, num_key_value_heads=2, max_position_embeddings=4096, original_max_position_embeddings=LIMIT,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors,
                         "original_max_position_embeddings": LIMIT},
        pad_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


def dynamic():
    config = transformers.LlamaConfig(
        **TINY, num_key_value_heads=2, max_position_embeddings=LIMIT,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


ROPES = {"longrope": longrope, "dynamic": dynamic}


def pairs_around_the_limit():
    draw = random.Random(3)
    lengths = [(4, 6, 9), (50, 5, 40), (50, 40, 5), (70, 9, 30), (20, 100, 100), (10, 53, 54), (10, 54, 55), (90, 2, 2)]
    return [
        ([draw.randrange(64) for _ in range(p)], [[draw.randrange(64) for _ in range(n)] for n in both])
        for p, *both in lengths
    ]


def plain_logps(build, prompt, response):
    """From a model that has seen nothing else."""
    torch.manual_seed(0)
    model = scaled(build())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("layout", ["shared-prefix", "separate"])
@pytest.mark.parametrize("rope", ROPES)
def test_a_row_beyond_the_limit_changes_no_other(rope, layout):
    groups = pairs_around_the_limit()
    expected = torch.cat(
        [plain_logps(ROPES[rope], prompt, responses[k]) for k in (0, 1) for prompt, responses in groups]
    )
    torch.manual_seed(0)
    model = scaled(ROPES[rope]())
    scorer = make_scorer(model, layout, None, 120, Listener().note, "m")
    assert scorer.packed == (layout == "shared-prefix")
    with torch.no_grad():
        for _ in range(2):  # `dynamic` remembers the rows of earlier passes
            assert (scorer(collate(groups, 0, scorer.packed)) - expected).abs().max() <= BOUND
        for k, group in enumerate(groups):
            batch = collate([group], 0, scorer.packed)
            ends = torch.tensor([len(r[j]) for j in (0, 1) for _, r in groups]).cumsum(0).tolist()
            own = torch.cat([expected[ends[r] - len(group[1][j]) : ends[r]] for j, r in ((0, k), (1, len(groups) + k))])
            assert (scorer(batch) - own).abs().max() <= BOUND


@pytest.mark.parametrize("rope", ROPES)
def test_without_the_rule_they_are_far_off(rope):
    """The test above tests something."""
    groups = pairs_around_the_limit()
    expected = torch.cat([plain_logps(ROPES[rope], p, r[k]) for k in (0, 1) for p, r in groups])
    torch.manual_seed(0)
    model = scaled(ROPES[rope]())
    scorer = TokenScorer(model)
    scorer.rule = LengthRule()
    with torch.no_grad():
        assert (scorer(collate(groups, 0, packed=False)) - expected).abs().max() > 100 * BOUND


@pytest.mark.parametrize("rope", ROPES)
def test_gradients_and_divergences_follow_the_rule(rope):
    groups = pairs_around_the_limit()
    results = []
    for packed in (True, False):
        torch.manual_seed(0)
        model = scaled(ROPES[rope](), 1.5)
        torch.manual_seed(1)
        reference = scaled(ROPES[rope](), 1.5).requires_grad_(False)
        layout = "shared-prefix" if packed else "separate"
        scorer, other = (make_scorer(m, layout, None, 120, Listener().note, "m") for m in (model, reference))
        result = compare(scorer, other, collate(groups, 0, packed), "policy||reference")
        (result.logps.sum() + result.kl.sum()).backward()
        results.append((result.logps.detach(), result.kl.detach(), model.get_input_embeddings().weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= BOUND * theirs.norm()


def test_the_limits_come_from_the_rope():
    assert length_rule(longrope()).limits == ((LIMIT, False),)
    assert length_rule(dynamic()).limits == ((LIMIT, True),)
    assert length_rule(random_model("llama")).limits == ()


def test_rows_within_the_limit_share_a_pass():
    model, calls = scaled(longrope()), []
    scorer = TokenScorer(model)
    model.model.register_forward_hook(lambda *_: calls.append(1))
    groups = pairs_around_the_limit()
    scorer(collate(groups[:1], 0, packed=False))
    assert len(calls) == 1
    scorer(collate(groups[:2], 0, packed=False))
    assert len(calls) == 3, "both within the limit and the one short response; the long one"


def test_a_model_whose_rows_depend_on_each_other_is_given_rows_of_one_length_or_refused():
    def longest_matters(model):
        body = model.model.forward

        def forward(input_ids, **kwargs):
            output = body(input_ids=input_ids, **kwargs)
            output.last_hidden_state = output.last_hidden_state * (1 + input_ids.shape[1] / 100)
            return output

        model.model.forward = forward
        return model

    scorer = make_scorer(longest_matters(random_model("llama")), "separate", None, 32, Listener().note, "m")
    groups = [([1, 2], [[3], [4, 5, 6]]), ([7], [[8, 9], [1, 2, 3, 4]])]
    together = scorer(collate(groups, 0, packed=False))
    alone = [scorer(collate([(p, [r[k]])], 0, packed=False)) for k in (0, 1) for p, r in groups]
    assert (together - torch.cat(alone)).abs().max() <= BOUND

    model = random_model("llama")
    body = model.model.forward
    model.model.forward = lambda input_ids, **kw: _times(body(input_ids=input_ids, **kw), 1 + len(input_ids) / 10)
    with pytest.raises(ModelError, match="depend on the other rows"):
        make_scorer(model, "separate", None, 32, Listener().note, "m")


def _times(output, factor):
    output.last_hidden_state = output.last_hidden_state * factor
    return output


# ---------------------------------------------------------------- experts, randomness, memory


def mixtral(seed):
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return scaled(transformers.MixtralForCausalLM(config))


@pytest.mark.parametrize("seed", range(6))
def test_experts_are_packed_whatever_the_seed(seed):
    heard = Listener()
    assert make_scorer(mixtral(seed), "auto", None, 64, heard.note, "m").packed
    assert heard.said == []


@pytest.mark.parametrize("change", [5e-7, 5e-5, 2e-3])
def test_rounding_is_no_leak_and_a_leak_is_found(monkeypatch, change):
    """The second packed batch, in which the chosen responses differ, gets other log-probs by this much."""
    actual, calls = layouts._logps, []

    def shifted(scorer, groups, packed):
        calls.append(packed)
        return actual(scorer, groups, packed) + (change if packed else 0)

    monkeypatch.setattr(layouts, "_logps", shifted)
    heard = Listener()
    scorer = make_scorer(random_model("llama"), "auto", None, 64, heard.note, "m")
    assert scorer.packed == (change < 1e-4)
    assert heard.said == [] or "attend to each other" in heard.said[0]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_the_probe_does_not_swallow_running_out_of_memory(monkeypatch, error):
    def fail(_model):
        raise error

    monkeypatch.setattr(layouts, "use_packed_attention", fail)
    with pytest.raises(type(error)) as caught:
        make_scorer(random_model("llama"), "auto", None, 64, Listener().note, "m")
    assert caught.value is error


def phimoe():
    torch.manual_seed(0)
    config = transformers.PhimoeConfig(
        **TINY, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.5,
        input_jitter_noise=0.5, max_position_embeddings=128, sliding_window=None,
    )  # fmt: skip
    return transformers.PhimoeForCausalLM(config)


def test_a_random_router_is_not_random_with_gradient_checkpointing(tmp_path):
    phimoe().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    groups = [([1, 2, 3], [[4, 5, 6, 7], [8, 9]]), ([9, 4], [[1], [3, 3, 7, 1]])]
    scorer = make_scorer(model, "auto", None, 32, Listener().note, "m")
    batch = collate(groups, 0, scorer.packed)
    with torch.no_grad():
        expected = scorer(batch)
    recompute_activations(scorer)
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert checkpointing
    assert all(module.training for module in checkpointing)
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        values = scorer(batch)
        assert (values - expected).abs().max() <= BOUND
        values.sum().backward()
    assert len(calls) == 6, "computed again in the backward pass"
    recompute_activations(scorer)


def test_a_model_that_stays_random_is_refused():
    model = random_model("llama")
    scorer = make_scorer(model, "auto", None, 32, Listener().note, "m")
    model.model.norm.register_forward_hook(lambda _m, _i, output: output * (1 + 0.1 * torch.rand(1)))
    with pytest.raises(ModelError, match="random"):
        recompute_activations(scorer)
