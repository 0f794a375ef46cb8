"""The head in chunks: values and gradients of the plain formula in float64, however it is cut; memory of one chunk."""

from __future__ import annotations

import copy

import pytest
import torch
from test_logprobs import FAMILIES, Memory, random_model
from torch import nn

from tisdpo_cli.model import head as head_module
from tisdpo_cli.model.head import PlainHead, candidates
from tisdpo_cli.model.logprobs import TokenScorer

N, H, V = 37, 12, 53


def inputs(bias: bool, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(H, V, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(N, H, generator=generator)
    return linear, hidden, torch.randint(V, (N,), generator=generator), torch.randn(N, generator=generator)


def plain(linear: nn.Linear, hidden, targets, scale, softcap):
    logits = linear(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("rows", [1, 5, 1000], ids=lambda rows: f"chunks of {rows}")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("saved", [0, 10**9], ids=["recomputed", "saved"])
def test_values_and_gradients(monkeypatch, rows, softcap, scale, bias, saved):
    monkeypatch.setattr(head_module, "_CHUNK_LOGITS", 0)
    monkeypatch.setattr(head_module, "_CHUNK_ROWS", rows)
    monkeypatch.setattr(head_module, "_SAVED_LOGITS", saved)
    linear, hidden, targets, coefficients = inputs(bias)
    exact, exact_hidden = copy.deepcopy(linear).double(), hidden.double().requires_grad_()
    expected = plain(exact, exact_hidden, targets, scale, softcap)
    hidden.requires_grad_()
    got = PlainHead(linear, scale, softcap).logps(hidden, targets, None)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-5
    (got * coefficients).sum().backward()
    (expected * coefficients).sum().backward()
    pairs = [(hidden, exact_hidden), *zip(linear.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_backward_pass_one_chunk_is_held(monkeypatch, mode):
    monkeypatch.setattr(head_module, "_CHUNK_LOGITS", 0)
    monkeypatch.setattr(head_module, "_CHUNK_ROWS", 16)
    vocabulary, peaks = 3000, []
    for positions in (64, 512):
        linear, hidden = nn.Linear(8, vocabulary, bias=False), torch.randn(positions, 8)
        with mode(), Memory() as held:
            PlainHead(linear).logps(hidden, torch.arange(positions), None)
        peaks.append(held.peak)
    assert peaks[1] - peaks[0] < 16 * vocabulary


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_second_backward_pass_gives_the_same(softcap):
    linear, hidden, targets, coefficients = inputs(True)
    hidden.requires_grad_()
    total = (PlainHead(linear, 0.3, softcap).logps(hidden, targets, None) * coefficients).sum()
    first, second = (torch.autograd.grad(total, (hidden, linear.weight), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_by_finite_differences(monkeypatch):
    monkeypatch.setattr(head_module, "_CHUNK_ROWS", 3)
    linear, hidden, targets, _ = inputs(True)
    linear = linear.double()
    # In float64 the function itself would round to float32: differences must be of that size.
    found = PlainHead(linear, 0.5, 4.0)

    def total(values):
        return found.logps(values, targets, None).double().sum()

    at = hidden.double().requires_grad_()
    total(at).backward()
    step = torch.zeros_like(at)
    for place in ((0, 0), (5, 3), (36, 11)):
        step.zero_()
        step[place] = 1e-2
        with torch.no_grad():
            slope = (total(at + step) - total(at - step)) / 2e-2
        assert at.grad[place].item() == pytest.approx(slope.item(), abs=2e-3)


def test_what_needs_no_gradient_gets_none():
    linear, hidden, targets, _ = inputs(False)
    linear.requires_grad_(False)
    hidden.requires_grad_()
    PlainHead(linear).logps(hidden, targets, None).sum().backward()
    assert hidden.grad is not None
    assert linear.weight.grad is None


def test_bf16_products_are_summed_in_float32():
    linear, hidden, targets, _ = inputs(True)
    hidden.requires_grad_()
    exact = plain(linear, hidden, targets, 1.0, None)
    with torch.autocast("cpu", torch.bfloat16):
        got = PlainHead(linear).logps(hidden, targets, torch.bfloat16)
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 0.1
    got.sum().backward()
    assert linear.weight.grad.dtype == hidden.grad.dtype == torch.float32
    (of_exact,) = torch.autograd.grad(exact.sum(), linear.weight)
    assert (linear.weight.grad - of_exact).norm() < 0.02 * of_exact.norm()


def test_memory_does_not_grow_with_positions_beyond_a_chunk(monkeypatch):
    """In both passes: the logits of all positions are never there at once, not even in parts."""
    monkeypatch.setattr(head_module, "_CHUNK_LOGITS", 0)
    monkeypatch.setattr(head_module, "_CHUNK_ROWS", 16)
    monkeypatch.setattr(head_module, "_SAVED_LOGITS", 0)
    vocabulary, width = 3000, 8
    peaks = []
    for positions in (64, 512):
        linear, hidden = nn.Linear(width, vocabulary, bias=False), torch.randn(positions, width, requires_grad=True)
        targets = torch.arange(positions)
        with Memory() as held:
            PlainHead(linear).logps(hidden, targets, None).sum().backward()
        assert held.largest <= 16 * vocabulary + width * vocabulary
        peaks.append(held.peak)
    assert peaks[1] - peaks[0] < 16 * vocabulary


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_every_family_is_known(family):
    assert TokenScorer(random_model(family))._plain is not None


def test_a_head_that_does_more_than_it_says_goes_through_its_own_module():
    model = random_model("llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: (
        forward(hidden) * 1.1 + 0.01 * hidden.sum(-1, keepdim=True) ** 2 * torch.arange(model.lm_head.out_features)
    )
    assert list(candidates(model))
    assert TokenScorer(model)._plain is None
