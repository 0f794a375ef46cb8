"""The library: the same numbers as the program's, any kind of array, clear errors, and no torch at import."""

import doctest
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tisdpo_cli
from tisdpo_cli import library, preference_loss, token_scores, token_weights
from tisdpo_cli.method import objectives, recipe
from tisdpo_cli.method.steps import Context, centers_of
from tisdpo_cli.method.transforms import TRANSFORMS, RandomStream

SIDES = ("chosen", "rejected")
# Two equal scores, and some beyond every clamp.
SCORES = [0.3, -2.5, 1.0, 0.3, 2.0, -0.1, 0.75]


def unpadded(logps, ref_logps, mask, weights=None):
    """What `pair_losses` takes: the tokens of padded [2B, T] tensors, one after the other."""
    seen = mask.bool()
    return logps[seen], ref_logps[seen], None if weights is None else weights[seen], seen.nonzero()[:, 0]


@pytest.fixture
def batch():
    """Log-probs, reference log-probs, mask and weights, [2B, T] each, of 3 pairs."""
    torch.manual_seed(0)
    logps, ref_logps = -torch.rand(6, 5) * 3, -torch.rand(6, 5) * 3
    mask = (torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 5])[:, None]).long()
    return logps.requires_grad_(), ref_logps, mask, torch.rand(6, 5) * 2


def test_importing_the_package_loads_neither_torch_nor_numpy():
    code = (
        "import sys, tisdpo_cli; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "from tisdpo_cli import OBJECTIVES, PRESETS, STEPS, TRANSFORMS; assert 'torch' not in sys.modules\n"
        "from tisdpo_cli import token_weights; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_exported_name_is_there():
    assert set(tisdpo_cli.__all__) <= set(dir(tisdpo_cli))
    for name in tisdpo_cli.__all__:
        assert getattr(tisdpo_cli, name) is not None
    assert tisdpo_cli.TRANSFORMS is TRANSFORMS
    with pytest.raises(AttributeError, match="no attribute 'token_weight'"):
        tisdpo_cli.token_weight  # noqa: B018


def test_the_package_says_that_it_is_typed():
    assert (Path(tisdpo_cli.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_each_kind_of_array_comes_back_as_it_came(kind):
    forward, reverse = kind([-1.0, -2.0, -0.5]), kind([-1.5, -1.0, -0.5])
    scores = token_scores(forward, reverse)
    weights = token_weights(scores, "chosen")
    for values, expected in ((scores, [0.5, -1.0, 0.0]), (weights, [math.exp(0.5), math.exp(-0.5), 1.0])):
        assert type(values) is type(forward)
        assert kind is list or values.dtype in (np.float32, torch.float32)
        assert list(values) == pytest.approx(expected, rel=1e-6)


def test_the_input_stays_as_it_is_and_shares_no_memory_with_the_result():
    for scores in (torch.tensor(SCORES), np.array(SCORES, dtype=np.float32)):
        weights = token_weights(scores, "chosen", "origin")
        weights[0] = 7.0
        assert list(scores) == pytest.approx(SCORES)


def test_half_precision_and_gradient_are_left_behind():
    logps = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16, requires_grad=True)
    scores = token_scores(logps, torch.tensor([-2.0, -2.0], dtype=torch.bfloat16))
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert scores.tolist() == [1.0, 0.0]


def test_scores_have_any_shape():
    forward, reverse = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(token_scores(forward, reverse), forward - reverse)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("eos_weight", [None, "score", "one", "zero"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_weights_are_those_of_the_program(name, eos_weight, side):
    scores = torch.tensor(SCORES)
    how = recipe.resolve_recipe(name, eos_weight=eos_weight or "score", steps={"dead_zone": 0.2, "decay": 0.9})
    stream = RandomStream(3, 5, side)
    if eos_weight is None:
        expected = recipe.response_weights(scores, None, 7, False, how, stream)
    else:
        expected = recipe.response_weights(scores[:-1], scores[-1:], 6, True, how, stream)
    steps = {"dead_zone": 0.2, "decay": 0.9}
    got = token_weights(scores, side, name, eos_weight=eos_weight, steps=steps, seed=3, row=5)
    assert torch.equal(got, expected)


def test_presets_parameters_normalisation_and_the_context_of_steps():
    scores = torch.tensor(SCORES)
    assert token_weights(SCORES, "rejected", preset="default") == [1.0] * len(SCORES)
    narrow = token_weights(scores, "chosen", "rank_based", "named_params", max_scale=2.0)
    assert (narrow.min().item(), narrow.max().item()) == pytest.approx((0.6, 2.0))
    assert token_weights(scores, "chosen", normalize="mean").mean().item() == pytest.approx(1.0)
    centers = centers_of([SCORES] * 20)
    context = Context(centers, [0, 0, 1, 1, 2, 2, 2])
    steps = {"center": "dataset", "spans": "word"}
    centered = token_weights(scores, "chosen", "origin", steps=steps, context=context) + sum(SCORES) / 7
    assert centered.tolist() == pytest.approx([-1.1, -1.1, 0.65, 0.65, *[2.65 / 3] * 3], abs=1e-6)


def test_equal_scores_get_equal_weights():
    weights = token_weights([1.0, 0.0, 1.0, 2.0], "chosen", "rank_based", min_scale=0.0, max_scale=3.0)
    assert weights == [1.5, 0.0, 1.5, 3.0]
    assert token_weights([1.0, 0.0, 1.0, 2.0], "chosen", "binary", top_percent=50) == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_an_empty_response_has_no_weights(make):
    assert len(token_weights(make([]), "chosen", "rank_based", normalize="mean")) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_scores([0.0, 1.0], [0.0]), r"shape \[2\] and reverse_logps \[1\]"),
        (lambda: token_scores([0.0], [math.nan]), r"reverse_logps must be finite, not nan \(at \[0\]\)"),
        (lambda: token_weights([0.0, None], "chosen"), "scores must be finite, not nan"),
        (lambda: token_weights(["a"], "chosen"), "scores must hold numbers only"),
        (lambda: token_weights(torch.tensor([0.0, -math.inf]), "chosen"), r"not -inf \(at \[1\]\)"),
        (lambda: token_weights(torch.zeros(2, 2), "chosen"), r"of shape \[n\], not \[2, 2\]"),
        (lambda: token_weights([0.0], "left"), "side must be chosen or rejected, not 'left'"),
        (lambda: token_weights([0.0], "chosen", "expp"), "unknown transform 'expp'"),
        (lambda: token_weights([0.0], "chosen", preset="big"), "unknown preset 'big'"),
        (lambda: token_weights([0.0], "chosen", "binary", k=2.0), "no parameter"),
        (lambda: token_weights([0.0], "chosen", L=2.0), "below U"),
        (lambda: token_weights([0.0], "chosen", normalize="sum"), "normalize must be none or mean"),
        (lambda: token_weights([0.0], "chosen", "origin", normalize="mean"), "normalize mean"),
        (lambda: token_weights([0.0], "chosen", eos_weight="auto"), "eos_weight must be score or one or zero"),
        (lambda: token_weights([], "chosen", eos_weight="one"), "score of the EOS"),
        (lambda: token_weights([0.0], "chosen", steps={"center": "dataset"}), "center needs"),
        (lambda: token_weights([0.0], "chosen", steps={"smooth": 1.0}), "no parameter smooth"),
        (lambda: token_weights([1.5], "chosen", mu=100.0), "the weights must be finite, not inf"),
    ],
)
def test_scores_and_weights_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unit_weights_are_dpo(batch):
    logps, ref_logps, mask, _ = batch
    chosen, rejected = ((logps - ref_logps) * mask).sum(1).chunk(2)
    expected = -F.logsigmoid(0.1 * (chosen - rejected))
    result = preference_loss(logps, ref_logps, mask)
    assert torch.allclose(result.losses, expected, atol=1e-6)
    assert torch.allclose(result.rewards.chosen, 0.1 * chosen, atol=1e-6)
    assert torch.equal(result.losses, preference_loss(logps, ref_logps, mask, weights=torch.ones(6, 5)).losses)


CASES = {
    "dpo": {"alpha": 1.0, "label_smoothing": 0.1},
    "ipo": {"length_normalize": True},
    "tdpo1": {},
    "tdpo2": {"alpha": 0.3},
}


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_losses_are_those_of_the_program(name, batch):
    logps, ref_logps, mask, weights = batch
    kl = torch.rand(6, 5, requires_grad=True)
    objective = objectives.resolve_loss(name, 0.3, CASES[name])
    takes = objective.objective.takes_weights
    policy, reference, flat, ids = unpadded(logps, ref_logps, mask, weights if takes else torch.ones(6, 5))
    expected = objectives.pair_losses(policy, reference, kl[mask.bool()], flat, ids, 3, objective)
    given = {"weights": weights} if takes else {}
    got = preference_loss(logps, ref_logps, mask, kl=kl, loss=name, beta=0.3, **given, **CASES[name])
    assert torch.equal(got.losses, expected.losses)
    assert all(map(torch.equal, got.rewards, expected.rewards))
    assert torch.equal(got.kl, expected.kl)
    (ours,), (theirs,) = (torch.autograd.grad(r.losses.sum(), logps, retain_graph=True) for r in (got, expected))
    assert torch.equal(ours, theirs)
    assert not ours[mask == 0].any()


def test_the_three_forms_of_a_batch_give_the_same_numbers(batch):
    logps, ref_logps, mask, weights = batch
    padded = preference_loss(logps, ref_logps, mask, weights=weights)
    sides = [(value[:3, :5], value[3:, :5]) for value in (logps, ref_logps, mask, weights)]
    assert torch.equal(preference_loss(*sides[:3], weights=sides[3]).losses, padded.losses)
    # A side is as wide as its longest response.
    narrow = [(value[:3], torch.cat([value[3:], value[3:]], 1)) for value in (logps, ref_logps, weights)]
    seen = (mask[:3], torch.cat([mask[3:], torch.zeros_like(mask[3:])], 1))
    assert torch.equal(preference_loss(*narrow[:2], seen, weights=narrow[2]).losses, padded.losses)
    policy, reference, flat, ids = unpadded(logps, ref_logps, mask, weights)
    assert torch.equal(preference_loss(policy, reference, response_ids=ids, weights=flat).losses, padded.losses)


def test_padding_is_never_read(batch):
    logps, ref_logps, mask, weights = batch
    clean = preference_loss(logps, ref_logps, mask, weights=weights).losses
    holes = [value.detach().masked_fill(mask == 0, math.nan) for value in (logps, ref_logps, weights)]
    assert torch.equal(preference_loss(holes[0], holes[1], mask.bool(), weights=holes[2]).losses, clean)


def test_a_training_step_moves_the_tokens_by_their_weights():
    logps = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.5, 4.0]], requires_grad=True)
    result = preference_loss(logps, torch.zeros(2, 3), torch.ones(2, 3), weights=weights, beta=0.5)
    result.losses.mean().backward()
    # β σ(−βu) w, with u = 0; down for the rejected response.
    assert logps.grad.tolist() == [[-0.5, -0.25, 0.0], [0.125, 0.125, 1.0]]
    assert weights.grad is None
    assert not result.rewards.chosen.requires_grad
    optimizer = torch.optim.SGD([logps], lr=1.0)
    optimizer.step()
    assert preference_loss(logps, torch.zeros(2, 3), torch.ones(2, 3), weights=weights).losses.item() < math.log(2)


def ones(*shape):
    """A tensor of ones."""
    return torch.ones(*shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preference_loss(ones(2, 3), ones(2, 3)), "either mask or response_ids"),
        (lambda: preference_loss(ones(3, 3), ones(3, 3), ones(3, 3)), r"mask must have shape \[2B, T\]"),
        (lambda: preference_loss(ones(2, 3), ones(2, 4), ones(2, 3)), r"ref_logps has shape \[1, 4\]"),
        (lambda: preference_loss(ones(2, 3), ones(2, 3), ones(2, 3), weights=ones(2)), r"weights must have shape"),
        (lambda: preference_loss(ones(2, 3), ones(2, 3), (ones(1, 3), ones(2, 3))), "1 chosen and 2 rejected rows"),
        (lambda: preference_loss(ones(2, 3), ones(2, 3) * math.nan, ones(2, 3)), "ref_logps must be finite"),
        (
            lambda: preference_loss(ones(4, 2), ones(4, 2), torch.tensor([[1, 1]] * 3 + [[0, 0]])),
            "rejected response of pair 1 has no tokens",
        ),
        (lambda: preference_loss(ones(2), ones(2), response_ids=torch.tensor([0, 2])), "from 0 to 2B"),
        (lambda: preference_loss(ones(2), ones(3), response_ids=torch.tensor([0, 1])), "as long as response_ids"),
        (lambda: preference_loss(ones(2, 1), ones(2, 1), ones(2, 1), beta=0.0), "beta must be above 0"),
        (lambda: preference_loss(ones(2, 1), ones(2, 1), ones(2, 1), loss="kto"), "unknown loss 'kto'"),
        (lambda: preference_loss(ones(2, 1), ones(2, 1), ones(2, 1), gamma=1.0), "no parameter gamma"),
        (lambda: preference_loss(ones(2, 1), ones(2, 1), ones(2, 1), alpha=1.0), "needs kl"),
        (
            lambda: preference_loss(
                ones(2, 1), ones(2, 1), ones(2, 1), kl=ones(2, 1), loss="tdpo1", weights=ones(2, 1)
            ),
            "takes no token weights",
        ),
    ],
)
def test_batches_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(library).failed == 0
    assert doctest.testmod(library).attempted > 0


GUIDE = Path(__file__).parents[1] / "examples" / "guides" / "own-trainer.md"


@pytest.mark.parametrize("name", ["weights.py", "loss.py"])
def test_the_guides_snippets_print_what_their_comments_say(name, capsys):
    """`tests/test_guides.py` runs the others, which need models."""
    block = re.search(rf"^```python file={re.escape(name)}\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    assert block is not None
    exec(compile(block[1], name, "exec"), {})
    printed = capsys.readouterr().out.strip()
    expected = re.search(r"print\(.*\)  # (tensor.*)", block[1])
    assert expected is None or printed == expected[1]
    assert printed.startswith("tensor(")
