"""Per-token log-probs and divergences of many model families against the oracle, however rows are batched.

Bounds, in float32 and per token: 1e-5 nat from the float64 oracle and between any two ways to batch; gradients
within 1e-5 of their norm. Divergences are never below -1e-6. In bf16: 0.1 nat.
"""

import copy
import random

import oracle
import pytest
import torch
import transformers as hf
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tisdpo_cli.model import logprobs as scoring
from tisdpo_cli.model.batch import collate
from tisdpo_cli.model.logprobs import TokenScorer, compare, score

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
    "mixtral, experts": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig,
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    "opt, a decoder in its body": (
        hf.OPTForCausalLM,
        hf.OPTConfig,
        {
            **SMALL, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "word_embed_proj_dim": 8, "dropout": 0.0,
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


def in_float64(model):
    """A copy for the oracle. (The fast kernels of experts have no float64.)"""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    return exact


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


def apart(rows, pad=0):
    """A batch in which every response has a row of its own."""
    return collate([(prompt, [response]) for prompt, response in rows], pad, packed=False)


def per_row(scorer, rows, pad=0):
    """Log-probs of rows that go through in one batch, a tensor for each row."""
    batch = apart(rows, pad)
    values = score(scorer, batch)
    assert values.shape == batch.targets.shape
    assert values.dtype == torch.float32
    return [values[batch.response_ids == r] for r in range(len(rows))]


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
    exact = in_float64(model)
    with torch.no_grad():
        for (prompt, response), got in zip(rows, per_row(TokenScorer(model), rows), strict=True):
            expected = oracle.token_logps(exact, prompt, response)
            assert (got - expected).abs().max() <= LOGP_BOUND
            assert expected.max() < 0


def sizes_at_the_head(model, rows):
    """Numbers that the head's module puts out while rows are scored."""
    scorer, seen = TokenScorer(model), []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: seen.append(output.numel()))
    per_row(scorer, rows)
    handle.remove()
    return seen


def test_only_scored_positions_reach_the_head(model, rows):
    """Its module sees one position, for form's sake; what is scored goes through its weights. Or through the module,
    where it is no plain linear layer."""
    scored = sum(len(response) for _prompt, response in rows)
    assert sizes_at_the_head(model, rows) == [VOCAB]
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.__class__ = type("OfItsOwn", (type(head),), {})
    assert sizes_at_the_head(model, rows) == [VOCAB, scored * VOCAB]


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
    batch = apart([([5, 6], [7, 8]), ([9], [5])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 5, 0, 0]]
    assert batch.positions.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [7, 8, 5]
    assert batch.response_ids.tolist() == [0, 0, 1]
    assert batch.real_tokens == 6


def test_tokens_equal_to_the_padding_id_are_scored():
    batch = apart([([0, 0], [0, 0]), ([1, 2, 3], [0])])
    assert batch.targets.tolist() == [0, 0, 0]
    assert batch.real_tokens == 8


def test_a_response_may_be_empty():
    batch = apart([([1], []), ([1], [2])])
    assert batch.response_ids.tolist() == [1]


def test_a_row_needs_a_prompt_token():
    with pytest.raises(ValueError, match="at least one prompt token"):
        apart([([], [1, 2])])


# ---------------------------------------------------------------- two distributions compared

DIVERGENCES = ["policy||reference", "reference||policy"]


@pytest.fixture
def small_chunks(monkeypatch):
    """A few positions at a time, so that batches of these tests need many chunks."""
    monkeypatch.setattr(scoring, "_CHUNK_LOGITS", 0)
    monkeypatch.setattr(scoring, "_CHUNK_ROWS", 5)


def compared(model, reference, rows, divergence):
    """What `compare` says of rows in one batch."""
    return compare(TokenScorer(model), TokenScorer(reference), apart(rows, 0), divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_and_log_probs_agree_with_the_oracle(model, reference, rows, divergence, small_chunks):
    exact, exact_reference = in_float64(model), in_float64(reference)
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
    policy, exact, exact_reference = copy.deepcopy(model), in_float64(model), in_float64(reference)
    got = compared(policy, reference, rows, divergence)
    weights = torch.cos(torch.arange(len(got.kl)))
    (weights * (got.kl + 0.3 * got.logps)).sum().backward()
    kls = [oracle.token_kls(exact, exact_reference, *row)[DIVERGENCES.index(divergence)] for row in rows]
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
    batch = apart(rows, 0)
    assert torch.equal(got.logps, score(TokenScorer(model), batch))
    assert torch.equal(got.ref_logps, score(TokenScorer(reference), batch))
    assert got.kl is None


def parameter_gradients(model):
    """The gradient of every parameter, as one vector; zero where there is none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_size_of_chunks_changes_nothing(rows, monkeypatch, divergence):
    made = []
    for logits, size in ((0, 1), (0, 7), (VOCAB * 11, 1), (0, 10**6)):
        monkeypatch.setattr(scoring, "_CHUNK_LOGITS", logits)
        monkeypatch.setattr(scoring, "_CHUNK_ROWS", size)
        model, reference = random_model("llama"), random_model("llama", 1)
        got = compared(model, reference, rows, divergence)
        (torch.cos(torch.arange(len(got.kl))) * (got.kl + got.logps)).sum().backward()
        made.append((got, parameter_gradients(model)))
    whole, whole_gradient = made[-1]
    for got, gradient in made[:-1]:
        assert all((a - b).abs().max() <= LOGP_BOUND for a, b in zip(got, whole, strict=True))
        assert close(gradient, whole_gradient)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-2])
def test_divergences_are_not_negative(model, rows, divergence, noise):
    """Nor far from the oracle, however close the models are to each other."""
    torch.manual_seed(0)
    near = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
        assert compared(model, near, rows, divergence).kl.min() >= -1e-6


def test_only_the_policy_is_trained(rows):
    """Not even a reference whose weights could be."""
    policy, drop_untrainable = random_model("llama"), random_model("llama", 1)
    graphs = []
    for m in (policy, drop_untrainable):
        m.model.layers[0].register_forward_hook(lambda _m, _i, output: graphs.append(output.requires_grad))
    got = compared(policy, drop_untrainable, rows, DIVERGENCES[0])
    assert graphs == [True, False]
    assert (got.logps.requires_grad, got.ref_logps.requires_grad, got.kl.requires_grad) == (True, False, True)
    (got.kl + got.logps + got.ref_logps).sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for p in drop_untrainable.parameters())


def test_batch_size_order_and_padding_change_no_divergence(rows):
    model, reference = random_model("gemma2, soft caps"), random_model("gemma2, soft caps", 1)

    def of_each(batches):
        found = {}
        for members in batches:
            kl = compared(model, reference, [rows[r] for r in members], DIVERGENCES[1]).kl
            parts = kl.split([len(rows[r][1]) for r in members])
            found.update(zip(members, parts, strict=True))
        return torch.cat([found[r] for r in range(len(rows))])

    everything = list(range(len(rows)))
    with torch.no_grad():
        alone = of_each([[r] for r in everything])
        for batches in ([everything], [everything[::-1]], [everything[4:], everything[3::-1]]):
            assert (of_each(batches) - alone).abs().max() <= LOGP_BOUND


def test_rows_without_a_scored_token_compare_to_nothing():
    model, reference = random_model("llama"), random_model("llama", 1)
    assert [len(values) for values in compared(model, reference, [([1, 2], [])], DIVERGENCES[0])] == [0, 0, 0]


class Headless(hf.LlamaForCausalLM):
    """A model that does not say which module its head is."""

    def get_output_embeddings(self):
        return None


class Bodiless(hf.LlamaForCausalLM):
    """A model that does not say which module its body is."""

    def get_decoder(self):
        return self


@pytest.mark.parametrize("kind", [Headless, Bodiless])
def test_models_that_hide_a_part_give_the_same(kind, rows):
    plain, reference = random_model("llama"), random_model("llama", 1).requires_grad_(False)
    hiding = kind(plain.config)
    hiding.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, hiding.eval()):
        got = compared(model, reference, rows, DIVERGENCES[0])
        (got.kl + got.logps).sum().backward()
        results.append((got, parameter_gradients(model)))
    (expected, gradient), (got, same_gradient) = results
    assert all((a - b).abs().max() <= LOGP_BOUND for a, b in zip(got, expected, strict=True))
    assert close(same_gradient, gradient)


class Memory(TorchDispatchMode):
    """Numbers of elements: of the largest tensor that any operation makes, and of all of them alive at once."""

    def __init__(self):
        super().__init__()
        self.largest, self.peak = 0, 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                size = storage.nbytes() // tensor.element_size()
                self.largest = max(self.largest, size)
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), size
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return made


@pytest.mark.parametrize("family", ["llama", "gemma2, soft caps", "opt, a decoder in its body"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_times_vocabulary_are_never_held(family, divergence, small_chunks):
    """In the forward and the backward pass: neither in one tensor nor in the sum of many."""
    vocabulary, tokens = 4000, 400
    model, reference = (random_model(family, seed, vocab_size=vocabulary, num_hidden_layers=1) for seed in (0, 1))
    reference.requires_grad_(False)
    rows = [([1, 2], [3] * 40)] * 10

    with Memory() as chunked:
        got = compared(model, reference, rows, divergence)
        (got.kl + got.logps).sum().backward()
    with Memory() as dense:
        batch = apart(rows, 0)
        with torch.no_grad():
            theirs = reference(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions].log_softmax(-1)
        ours = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions].log_softmax(-1)
        (ours.exp() * (ours - theirs)).sum().backward()
    assert dense.largest >= tokens * vocabulary
    assert dense.peak >= 3 * tokens * vocabulary
    assert chunked.largest < tokens * vocabulary / 10
    assert chunked.peak < tokens * vocabulary / 2


def state_of(model):
    """What a method or hook put on any module of a model would change."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [
        (module.__dict__.get("forward"), *(list(getattr(module, name).values()) for name in hooks))
        for module in model.modules()
    ]


class Broken(Exception):
    """Raised by a head."""


def failing_at(head, call):
    """Make a head raise at its call of this number, counted from 0."""
    calls = iter(range(10**6))

    def fail(*_):
        if next(calls) == call:
            raise Broken

    return head.register_forward_hook(fail)


def test_a_model_is_left_as_it_was_after_a_comparison(model, reference, rows):
    before = torch.cat([p.flatten() for p in model.parameters()])
    states = [state_of(m) for m in (model, reference)]
    compared(model, reference, rows, DIVERGENCES[0])
    with pytest.raises(IndexError):
        compared(model, reference, [([0], [VOCAB + 5])], DIVERGENCES[0])
    assert [state_of(m) for m in (model, reference)] == states
    for m in (model, reference):
        assert not any("forward" in module.__dict__ for module in m.modules())
        assert not any(module._forward_pre_hooks for module in m.modules())
    assert torch.equal(before, torch.cat([p.flatten() for p in model.parameters()]))


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_a_model_is_left_as_it_was_when_its_head_fails(which, rows, small_chunks):
    """On the whole rows, in a chunk, and when the backward pass makes a chunk again."""
    policy, reference = random_model("llama"), random_model("llama", 1).requires_grad_(False)
    before = [state_of(m) for m in (policy, reference)]
    broken = policy if which == "policy" else reference
    chunks = -(-len(apart(rows, 0).targets) // 5)
    for call in (0, 1, 3, chunks + 1, chunks + 4):
        handle = failing_at(broken.get_output_embeddings(), call)
        with pytest.raises(Broken):
            compared(policy, reference, rows, DIVERGENCES[0]).kl.sum().backward()
        handle.remove()
        assert [state_of(m) for m in (policy, reference)] == before


def test_a_body_that_was_given_a_forward_of_its_own_keeps_it(rows):
    """As accelerate's hooks give it, which offload weights and spread them over devices."""
    policy, reference = random_model("llama"), random_model("llama", 1).requires_grad_(False)
    expected = compared(policy, reference, rows, DIVERGENCES[0])
    for m in (policy, reference):
        add_hook_to_module(m.get_decoder(), ModelHook())
    before = [state_of(m) for m in (policy, reference)]
    for _ in range(2):
        got = compared(policy, reference, rows, DIVERGENCES[0])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert [state_of(m) for m in (policy, reference)] == before


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral, experts", "opt, a decoder in its body"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_the_model_changes_nothing(family, reentrant, rows, small_chunks):
    """In training mode, without which it would not be at work."""
    values, gradients = [], []
    for checkpointing in (False, True):
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
        model, reference = random_model(family, **no_dropout), random_model(family, 1).requires_grad_(False)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        got = compared(model, reference, rows, DIVERGENCES[0])
        (got.kl + got.logps).sum().backward()
        values.append(torch.cat([got.kl, got.logps]).detach())
        gradients.append(parameter_gradients(model))
    assert (values[0] - values[1]).abs().max() <= LOGP_BOUND
    assert close(*gradients)


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0, 3000.0])
def test_divergences_of_distributions_that_are_far_apart(size):
    """Value and gradient as in float64, where one says of a token that it cannot be and the other that it must."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (size * torch.randn(5, 40, generator=generator) for _ in range(2))
    found = []
    for dtype in (torch.float32, torch.float64):
        logits = ours.to(dtype, copy=True).requires_grad_()
        p, q = logits.log_softmax(-1), theirs.to(dtype).log_softmax(-1)
        kl = scoring._kl(p, q) if dtype == torch.float32 else (p.exp() * (p - q)).sum(-1)
        kl.sum().backward()
        found.append((kl.detach(), logits.grad))
    for got, expected in zip(*found, strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-6 * size)


def test_tokens_that_neither_distribution_knows_count_nothing():
    logits = torch.tensor([[0.3, -1.0, float("-inf"), 2.0]])
    theirs = torch.tensor([[0.1, 0.4, float("-inf"), 1.0]])
    ours = logits.clone().requires_grad_()
    kl = scoring._kl(ours.log_softmax(-1), theirs.log_softmax(-1))
    known = [0, 1, 3]
    p, q = (values[:, known].log_softmax(-1) for values in (logits, theirs))
    assert kl.item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)
    kl.sum().backward()
    assert ours.grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("family", ["llama", "gemma2, soft caps", "gpt2"])
def test_bf16_computes_divergences_in_float32(family, divergence, rows, small_chunks):
    """Weights of a usual size here; the same weights still have no divergence at all."""
    model, reference = (random_model(family, seed, initializer_range=0.1) for seed in (0, 1))
    reference.requires_grad_(False)
    with torch.no_grad():
        exact = compared(model, reference, rows, divergence)
    scorer, other, same = (TokenScorer(m, torch.bfloat16) for m in (model, reference, copy.deepcopy(model)))
    rough = compare(scorer, other, apart(rows, 0), divergence)
    assert {values.dtype for values in rough} == {torch.float32}
    assert all((a - b).abs().max() < 0.1 for a, b in zip(rough, exact, strict=True))
    assert exact.kl.max() > 0.1
    rough.kl.sum().backward()
    assert all(
        p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in model.parameters()
    )
    assert parameter_gradients(model).norm() > 0
    assert not compare(scorer, same, apart(rows, 0), divergence).kl.any()


def test_weights_in_bf16_give_float32(rows):
    model, reference = (random_model("llama", seed, initializer_range=0.1) for seed in (0, 1))
    with torch.no_grad():
        exact = compared(model, reference, rows, DIVERGENCES[0])
        rough = compared(model.bfloat16(), reference.bfloat16(), rows, DIVERGENCES[0])
    assert {values.dtype for values in rough} == {torch.float32}
    assert all((a - b).abs().max() < 0.1 for a, b in zip(rough, exact, strict=True))
