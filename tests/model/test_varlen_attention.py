"""Attention by a kernel for many lengths. The kernel here is written out by its documented convention; that of a GPU is
checked by `agrees` where there is one.
"""

import inspect
import sys
import types

import pytest
import torch
from test_layout import LENGTHS, attention_by_hand, random_heads
from torch.utils.checkpoint import checkpoint

from tisdpo_cli.model import varlen_attention as varlen
from tisdpo_cli.model.packed_attention import AttentionSpec, PackedLayout, segment_attention

CPU = torch.device("cpu")


def by_hand(query, key, value, lengths, spec, ignoring=()):
    """Sequence by sequence, the last query seeing the last key; window and cap as in the spec, or ignored."""
    window = None if "window" in ignoring else spec.window
    softcap = None if "softcap" in ignoring else spec.softcap
    made = []
    assert max(lengths.queries.diff()) == lengths.most_queries
    assert max(lengths.keys.diff()) == lengths.most_keys
    for n in range(len(lengths.queries) - 1):
        q = query[lengths.queries[n] : lengths.queries[n + 1]].transpose(0, 1)
        k, v = (of[lengths.keys[n] : lengths.keys[n + 1]].transpose(0, 1) for of in (key, value))
        k, v = (of.repeat_interleave(len(q) // len(of), dim=0) for of in (k, v))
        scores = q @ k.transpose(1, 2) * (spec.scaling or q.shape[-1] ** -0.5)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        made.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(made)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_one_call_of_a_kernel_is_attention_by_groups(window, softcap, key_heads):
    ours, theirs, groups = random_heads(key_heads), random_heads(key_heads), PackedLayout(LENGTHS)
    got = varlen.varlen_attention(*ours, groups, AttentionSpec(0.4, window, softcap), by_hand)
    expected = attention_by_hand(*theirs, LENGTHS, 0.4, window, softcap)
    assert groups.calls == 1
    assert torch.allclose(got, expected, atol=1e-12)
    for values in (got, expected):
        (values * torch.arange(values.numel()).view(values.shape).cos()).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12)


RULES = [
    AttentionSpec(),
    AttentionSpec(0.3),
    AttentionSpec(None, 7),
    AttentionSpec(None, 4096),
    AttentionSpec(None, None, 50.0),
    AttentionSpec(0.1, 30, 2.0),
]


@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_right_kernel_agrees(spec, dtype):
    assert varlen.agrees(by_hand, (4, 2, 16), spec, dtype, CPU)


def wrong_scale(query, key, value, lengths, spec):
    return by_hand(query, key, value, lengths, AttentionSpec(1.3 * query.shape[-1] ** -0.5, spec.window, spec.softcap))


def without_window(*given):
    return by_hand(*given, ignoring=("window",))


def without_cap(*given):
    return by_hand(*given, ignoring=("softcap",))


def one_too_few(query, key, value, lengths, spec):
    return by_hand(query, key, value, lengths, AttentionSpec(spec.scaling, spec.window - 1, spec.softcap))


def first_keys_first(query, key, value, lengths, spec):
    """The other convention of causal attention: the first query sees the first key."""
    cut = torch.cat([torch.arange(a, a + n) for a, n in zip(lengths.keys[:-1], lengths.queries.diff(), strict=True)])
    same = varlen.Lengths(lengths.queries, lengths.queries, lengths.most_queries, lengths.most_queries)
    return by_hand(query, key[cut], value[cut], same, spec)


def no_gradient(*given):
    return by_hand(*(g.detach() if isinstance(g, torch.Tensor) else g for g in given))


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def another_gradient(query, key, value, lengths, spec):
    return by_hand(query, Tripled.apply(key), value, lengths, spec)


def of_a_package_that_is_not_there(*given):
    import no_such_package  # noqa: F401


@pytest.mark.parametrize(
    ("kernel", "spec"),
    [
        (wrong_scale, AttentionSpec()),
        (without_window, AttentionSpec(None, 4096)),
        (one_too_few, AttentionSpec(None, 4)),
        (one_too_few, AttentionSpec(0.02, 4096)),
        (another_gradient, AttentionSpec()),
        (without_cap, AttentionSpec(None, None, 50.0)),
        (first_keys_first, AttentionSpec()),
        (no_gradient, AttentionSpec()),
        (of_a_package_that_is_not_there, AttentionSpec()),
    ],
)
def test_a_wrong_kernel_is_found_out(kernel, spec):
    assert not varlen.agrees(kernel, (4, 2, 16), spec, torch.bfloat16, CPU)


def test_the_check_holds_under_inference_and_autocast():
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert varlen.agrees(by_hand, (2, 1, 8), AttentionSpec(), torch.bfloat16, CPU)


def of_flash_attn(q, k, v, cu_q, cu_k, most_q, most_k, *, softmax_scale, causal, window_size, softcap, deterministic):
    """With the conventions of flash-attn 2.6 and later: a window is counted without the token itself, 0 is no cap."""
    assert causal
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    window = None if window_size == (-1, -1) else window_size[0] + 1
    return by_hand(
        q, k, v, varlen.Lengths(cu_q, cu_k, most_q, most_k), AttentionSpec(softmax_scale, window, softcap or None)
    )


def of_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """With the conventions of torch's own: (−1, 0) is causal, and heads that share keys are asked for."""
    assert window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    window = None if window_size[0] < 0 else window_size[0] + 1
    return by_hand(query, key, value, varlen.Lengths(cu_seq_q, cu_seq_k, max_q, max_k), AttentionSpec(scale, window))


@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_packages_are_called_as_they_want_to_be(monkeypatch, spec, key_heads):
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = of_flash_attn
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = of_torch
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    varlen.agrees.cache_clear()
    shape = (4, key_heads, 16)
    assert varlen.agrees(varlen._by_flash_attn, shape, spec, torch.bfloat16, CPU)
    # Torch's own cannot cap scores; attention goes by groups there.
    assert varlen.agrees(varlen._by_torch, shape, spec, torch.bfloat16, CPU) == (spec.softcap is None)
    varlen.agrees.cache_clear()


def test_torch_has_the_parameters_that_are_named():
    kernels = pytest.importorskip("torch.nn.attention.varlen")
    parameters = inspect.signature(kernels.varlen_attn).parameters
    if "window_size" not in parameters:
        pytest.skip("this torch has another one, which is left alone")
    wanted = set(inspect.signature(of_torch).parameters)
    assert wanted <= set(parameters)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_check_may_come_first_in_a_checkpointed_layer(checkpointing):
    varlen.agrees.cache_clear()
    heads, groups, spec = [tensor.float() for tensor in random_heads(2)], PackedLayout(LENGTHS), AttentionSpec(0.4)
    heads[2] = heads[2].repeat(1, 1, 1, 2)[..., :8]
    given = [tensor.detach().requires_grad_() for tensor in heads]

    def layer(*tensors):
        assert varlen.agrees(by_hand, (4, 2, 8), spec, torch.bfloat16, CPU)
        return varlen.varlen_attention(*tensors, groups, spec, by_hand).tanh()

    made = checkpoint(layer, *given, use_reentrant=False) if checkpointing else layer(*given)
    made.sum().backward()
    plain = [tensor.detach().requires_grad_() for tensor in heads]
    segment_attention(*plain, groups, spec).tanh().sum().backward()
    for a, b in zip(given, plain, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_lengths_of_an_inference_pass_serve_a_backward_pass():
    varlen._lengths.cache_clear()
    with torch.inference_mode():
        made = varlen._lengths(LENGTHS, CPU)
    assert not made.queries.is_inference()
    assert varlen._lengths(LENGTHS, CPU) is made


def test_on_a_cpu_attention_goes_by_groups(monkeypatch):
    monkeypatch.setattr(varlen, "agrees", lambda *_: pytest.fail("no kernel is tried"))
    heads = random_heads(2)
    got = varlen.packed_attention(*heads, PackedLayout(LENGTHS), AttentionSpec(0.4))
    assert torch.allclose(got, attention_by_hand(*heads, LENGTHS, 0.4, None, None), atol=1e-12)
