"""Per-token log-probs of many model families against the oracle, and their independence of how rows are batched.

Bounds, in float32 and per token: 1e-5 nat from the float64 oracle and between any two ways to batch; gradients
within 1e-5 of their norm.
"""

import copy
import random

import oracle
import pytest
import torch
import transformers as hf

from tisdpo_cli.scoring import TokenScorer, collate, score

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
}  # fmt: skip


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    """A random model of a family, with every bias and norm random too."""
    kind, config, values = FAMILIES[request.param]
    torch.manual_seed(0)
    made = kind(config(**values)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


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
