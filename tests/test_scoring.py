"""Per-token log-probs and divergences of many model families against the oracle, however rows are batched.

Bounds, in float32 and per token: 1e-5 nat from the float64 oracle and between any two ways to batch; gradients
within 1e-5 of their norm.
"""

import copy
import random

import oracle
import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

from tisdpo_cli import scoring
from tisdpo_cli.scoring import TokenScorer, collate, compare, score

VOCAB, EOS = 41, 40
LOGP_BOUND, GRADIENT_BOUND = 1e-5, 1e-5

# Initial weights far larger than usual: attention, windows and caps must matter to the log-probs.
SMALL = {"vocab_size": VOCAB, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SMALL, **LAYERS, "num_key_value_heads": 1}

FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "qwen2 tied": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**GROUPED, "head_dim": 8}),
    "mistral, window of 4": (hf.MistralForCausalLM, hf.MistralConfig, {**GROUPED, "sliding_window": 4}),
    "gemma2, soft caps": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config,
        {
            **GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0,
        },
    ),
    "phi, bias in the head": (hf.PhiForCausalLM, hf.PhiConfig, {**SMALL, **LAYERS}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {**SMALL, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "gpt-neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {**SMALL, **LAYERS}),
    "cohere, logit scale": (hf.CohereForCausalLM, hf.CohereConfig, {**GROUPED, "logit_scale": 0.25}),
    "granite, logits scaling": (hf.GraniteForCausalLM, hf.GraniteConfig, {**GROUPED, "logits_scaling": 3.0}),
    "opt, a decoder in its body": (
        hf.OPTForCausalLM,
        hf.OPTConfig,
        {
            **SMALL, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "word_embed_proj_dim": 16, "dropout": 0.0,
        },
    ),
}  # fmt: skip


def random_model(family, seed=0, **changed):
    """A random model of a family, with every bias and norm random too."""
    kind, config, values = FAMILIES[family]
    torch.manual_seed(seed)
    made = kind(config(**{**values, **changed})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    """A model of each family."""
    return random_model(request.param)


@pytest.fixture(scope="module")
def reference(model, request):
    """Another model of the same family."""
    family = next(name for name, (kind, *_) in FAMILIES.items() if type(model) is kind)
    return random_model(family, seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def rows():
    """Rows of prompt and response of many lengths, some beyond the window of 4, one with a single prompt token."""
    draw = random.Random(1)
    lengths = [(1, 1), (1, 9), (3, 2), (12, 5), (2, 14), (7, 1), (5, 6)]
    return [([draw.randrange(EOS) for _ in range(p)], [draw.randrange(EOS) for _ in range(r)]) for p, r in lengths]


def per_row(scorer, rows, pad=0):
    """Log-probs of rows that go through in one batch, a tensor for each row."""
    batch = collate(rows, pad)
    values = score(scorer, batch)
    assert values.shape == batch.targets.shape
    assert values.dtype == torch.float32
    return [values[batch.owner == r] for r in range(len(rows))]


def gradients(model, rows, batches, pad=0):
    """Gradients of a weighted sum of all log-probs, row by row the same weights, run in these batches of rows."""
    scorer = TokenScorer(model)
    model.zero_grad(set_to_none=True)
    for members in batches:
        values = per_row(scorer, [rows[r] for r in members], pad)
        weighted = [(v * torch.cos(torch.arange(len(v)) + r)).sum() for r, v in zip(members, values, strict=True)]
        torch.stack(weighted).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def close(a, b):
    """Whether gradients agree relative to their norm."""
    return (a - b).norm() <= GRADIENT_BOUND * b.norm()


def test_log_probs_agree_with_the_oracle(model, rows):
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        for (prompt, response), got in zip(rows, per_row(TokenScorer(model), rows), strict=True):
            expected = oracle.token_logps(exact, prompt, response)
            assert (got - expected).abs().max() <= LOGP_BOUND
            assert expected.max() < 0


def test_only_scored_positions_reach_the_head(model, rows):
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: seen.append(output.shape))
    per_row(TokenScorer(model), rows)
    handle.remove()
    scored = sum(len(response) for _prompt, response in rows)
    assert [shape.numel() for shape in seen] == [scored * VOCAB]


def test_the_model_is_left_as_it_was(model, rows):
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    per_row(TokenScorer(model), rows)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_batch_size_order_and_padding_change_nothing(model, rows):
    scorer = TokenScorer(model)
    with torch.no_grad():
        alone = [per_row(scorer, [row])[0] for row in rows]
        together = per_row(scorer, rows)
        backwards = per_row(scorer, rows[::-1])[::-1]
        beside_a_long_one = [per_row(scorer, [row, ([1] * 20, [2] * 20)])[0] for row in rows]
    for other in (together, backwards, beside_a_long_one):
        for got, expected in zip(other, alone, strict=True):
            assert (got - expected).abs().max() <= LOGP_BOUND


def test_gradients_do_not_depend_on_the_batch(model, rows):
    everything = list(range(len(rows)))
    alone = gradients(model, rows, [[r] for r in everything])
    assert close(gradients(model, rows, [everything]), alone)
    assert close(gradients(model, rows, [everything[4:], everything[3::-1]]), alone)


def test_the_padding_id_does_not_matter(model, rows):
    """Not even where it is the EOS, and the EOS is scored and part of a prompt."""
    with_eos = [([*prompt, EOS, 3], [*response, EOS]) for prompt, response in rows]
    scorer = TokenScorer(model)
    with torch.no_grad():
        zero, eos = (per_row(scorer, with_eos, pad) for pad in (0, EOS))
    assert all(torch.equal(a, b) for a, b in zip(zero, eos, strict=True))
    everything = [list(range(len(rows)))]
    assert close(gradients(model, with_eos, everything, EOS), gradients(model, with_eos, everything, 0))


# ---------------------------------------------------------------- batches


def test_collate_worked_example():
    """Two rows of width 4: the tokens before the scored ones stand at 1, 2 and, in the second row, at 4 + 0."""
    batch = collate([([5, 6], [7, 8]), ([9], [5])], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 5, 0, 0]]
    assert batch.positions.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [7, 8, 5]
    assert batch.owner.tolist() == [0, 0, 1]
    assert batch.real_tokens == 6


def test_tokens_equal_to_the_padding_id_are_scored():
    batch = collate([([0, 0], [0, 0]), ([1, 2, 3], [0])], pad_id=0)
    assert batch.targets.tolist() == [0, 0, 0]
    assert batch.real_tokens == 8


def test_a_response_may_be_empty():
    batch = collate([([1], []), ([1], [2])], pad_id=0)
    assert batch.owner.tolist() == [1]


def test_a_row_needs_a_prompt_token():
    with pytest.raises(ValueError, match="at least one prompt token"):
        collate([([], [1, 2])], pad_id=0)


# ---------------------------------------------------------------- two distributions compared

DIVERGENCES = ["policy||reference", "reference||policy"]


@pytest.fixture
def small_chunks(monkeypatch):
    """A few positions at a time, so that batches of these tests need many chunks."""
    monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 0)
    monkeypatch.setattr(scoring, "_CHUNK_ROWS", 5)


def compared(model, reference, rows, divergence):
    """What `compare` says of rows in one batch."""
    return compare(TokenScorer(model), TokenScorer(reference), collate(rows, 0), divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_and_log_probs_agree_with_the_oracle(model, reference, rows, divergence, small_chunks):
    exact, exact_reference = (copy.deepcopy(m).double() for m in (model, reference))
    with torch.no_grad():
        got = compared(model, reference, rows, divergence)
        logps = torch.cat([oracle.token_logps(exact, *row) for row in rows])
        ref_logps = torch.cat([oracle.token_logps(exact_reference, *row) for row in rows])
        kls = [oracle.token_kls(exact, exact_reference, *row)[DIVERGENCES.index(divergence)] for row in rows]
    assert {values.dtype for values in got} == {torch.float32}
    assert (got.logps - logps).abs().max() <= LOGP_BOUND
    assert (got.ref_logps - ref_logps).abs().max() <= LOGP_BOUND
    assert (got.kl - torch.cat(kls)).abs().max() <= LOGP_BOUND
    assert got.kl.mean() > 0.01, "the models must differ for this to show anything"


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_divergences_agree_with_the_oracle(model, reference, rows, divergence, small_chunks):
    """Not detached: the gradient flows through both the divergence and the log-probs, and only into the policy."""
    policy, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    got = compared(policy, reference, rows, divergence)
    weights = torch.cos(torch.arange(len(got.kl)))
    (weights * (got.kl + 0.3 * got.logps)).sum().backward()
    kls = [
        oracle.token_kls(exact, copy.deepcopy(reference).double(), *row)[DIVERGENCES.index(divergence)] for row in rows
    ]
    logps = [oracle.token_logps(exact, *row) for row in rows]
    (weights * (torch.cat(kls) + 0.3 * torch.cat(logps))).sum().backward()
    ours, expected = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (policy, exact))
    assert close(ours.double(), expected)
    assert expected.norm() > 0.01
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_same_weights_have_no_divergence_at_all(model, rows, divergence):
    policy = copy.deepcopy(model)
    got = compared(policy, copy.deepcopy(model).requires_grad_(False), rows, divergence)
    assert not got.kl.any()
    assert torch.equal(got.logps, got.ref_logps)
    got.kl.sum().backward()
    assert max(p.grad.abs().max() for p in policy.parameters() if p.grad is not None) < 1e-5


def test_without_a_divergence_log_probs_are_those_of_score(model, reference, rows):
    got = compared(model, reference, rows, None)
    batch = collate(rows, 0)
    assert torch.equal(got.logps, score(TokenScorer(model), batch))
    assert torch.equal(got.ref_logps, score(TokenScorer(reference), batch))
    assert got.kl is None


def test_the_size_of_chunks_changes_nothing(rows, monkeypatch):
    model, reference = random_model("llama"), random_model("llama", 1)
    made = []
    for size in (1, 7, 10**6):
        monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 0)
        monkeypatch.setattr(scoring, "_CHUNK_ROWS", size)
        made.append(compared(model, reference, rows, DIVERGENCES[0]))
    for other in made[1:]:
        assert all((a - b).abs().max() <= LOGP_BOUND for a, b in zip(made[0], other, strict=True))


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return made


def test_tokens_times_vocabulary_are_never_held(small_chunks):
    """In the forward and the backward pass."""
    vocabulary, tokens = 2000, 400
    model, reference = (random_model("llama", seed, vocab_size=vocabulary) for seed in (0, 1))
    rows = [([1, 2], [3] * 200), ([4], [5] * 200)]
    with LargestTensor() as chunked:
        got = compared(model, reference.requires_grad_(False), rows, DIVERGENCES[0])
        (got.kl + got.logps).sum().backward()
    with LargestTensor() as dense:
        score(TokenScorer(model), collate(rows, 0)).sum().backward()
    assert dense.size >= tokens * vocabulary
    assert chunked.size < tokens * vocabulary / 10


def test_a_model_is_left_as_it_was_after_a_comparison(model, reference, rows):
    before = torch.cat([p.flatten() for p in model.parameters()])
    compared(model, reference, rows, DIVERGENCES[0])
    with pytest.raises(IndexError):
        compared(model, reference, [([0], [VOCAB + 5])], DIVERGENCES[0])
    for m in (model, reference):
        assert "forward" not in m.get_decoder().__dict__
        assert not any(module._forward_pre_hooks for module in m.modules())
    assert torch.equal(before, torch.cat([p.flatten() for p in model.parameters()]))


def test_gradient_checkpointing_of_the_model_changes_nothing(rows, small_chunks):
    gradients = []
    for checkpointing in (False, True):
        model, reference = random_model("qwen3"), random_model("qwen3", 1).requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        compared(model, reference, rows, DIVERGENCES[0]).kl.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert close(*gradients)


def test_bf16_computes_divergences_in_float32(rows):
    model, reference = random_model("llama"), random_model("llama", 1)
    exact = compared(model, reference, rows, DIVERGENCES[0])
    scorers = (TokenScorer(m, torch.bfloat16) for m in (model, reference))
    rough = compare(*scorers, collate(rows, 0), DIVERGENCES[0])
    assert {values.dtype for values in rough} == {torch.float32}
    assert (rough.kl - exact.kl).abs().max() < 0.3
    assert (rough.kl - exact.kl).abs().mean() < 0.05
