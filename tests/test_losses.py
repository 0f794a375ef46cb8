"""The preference loss: DPO to the last bit with unit weights, the oracle within a bound, and by hand.

Bound: float32 losses and rewards agree with the float64 oracle within 1e-6 of their size, the gradient too.
"""

import math
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F

from tisdpo_cli.losses import dpo_objective, pair_losses, response_sums

BETA = 0.1


def random_pairs(seed, count, dtype=torch.float32):
    """Log-probs and weights of `count` pairs of 1 to 20 tokens a response, in the layout of `pair_losses`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (2 * count,), generator=generator)
    total = int(lengths.sum())
    draw = torch.rand(3, total, generator=generator, dtype=dtype)
    return SimpleNamespace(
        logps=-6 * draw[0],
        ref_logps=-6 * draw[1],
        weights=0.2 + 2 * draw[2],
        owner=torch.repeat_interleave(torch.arange(2 * count), lengths),
        count=count,
    )


def losses_of(batch, beta=BETA, **changed):
    """`pair_losses` of a batch, with some of it changed."""
    b = SimpleNamespace(**{**vars(batch), **changed})
    return pair_losses(b.logps, b.ref_logps, b.weights, b.owner, b.count, beta)


def as_oracle_pairs(batch):
    """The same pairs as the oracle takes them."""
    pairs = []
    for b in range(batch.count):
        chosen, rejected = batch.owner == b, batch.owner == batch.count + b
        pairs.append(
            {
                "policy_chosen_logps": batch.logps[chosen],
                "policy_rejected_logps": batch.logps[rejected],
                "reference_chosen_logps": batch.ref_logps[chosen],
                "reference_rejected_logps": batch.ref_logps[rejected],
                "chosen_weights": batch.weights[chosen],
                "rejected_weights": batch.weights[rejected],
            }
        )
    return pairs


def plain_dpo(batch, logps):
    """DPO (Eq. 7 of its paper) written plainly: one pair after the other, one token after the other."""
    losses = []
    for b in range(batch.count):
        u = torch.zeros(())
        for response, sign in ((b, 1), (batch.count + b, -1)):
            total = torch.zeros(())
            for t in (batch.owner == response).nonzero()[:, 0]:
                total = total + (logps[t] - batch.ref_logps[t])
            u = u + sign * total
        losses.append(-F.logsigmoid(BETA * u))
    return torch.stack(losses)


# ---------------------------------------------------------------- DPO


@pytest.mark.parametrize("seed", range(5))
def test_unit_weights_are_dpo_to_the_last_bit(seed):
    batch = random_pairs(seed, 4)
    ours, plain = batch.logps.clone().requires_grad_(), batch.logps.clone().requires_grad_()
    losses = losses_of(batch, logps=ours, weights=torch.ones_like(ours)).losses
    expected = plain_dpo(batch, plain)
    assert torch.equal(losses, expected)
    losses.sum().backward()
    expected.sum().backward()
    assert torch.equal(ours.grad, plain.grad)


def test_policy_equal_to_reference_gives_ln_2():
    batch = random_pairs(0, 3)
    result = losses_of(batch, logps=batch.ref_logps)
    assert result.losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-7)
    assert all(not reward.any() for reward in result.rewards)


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("seed", range(10))
def test_loss_gradient_and_rewards_agree_with_the_oracle(seed):
    batch = random_pairs(seed, 1 + seed % 4)
    logps = batch.logps.clone().requires_grad_()
    exact = SimpleNamespace(**{**vars(batch), "logps": batch.logps.double().requires_grad_()})
    result = losses_of(batch, logps=logps)
    expected = oracle.tis_dpo_loss(as_oracle_pairs(exact), BETA)
    assert result.losses.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    result.losses.mean().backward()
    expected.backward()
    assert torch.allclose(logps.grad.double(), exact.logps.grad, rtol=1e-6, atol=1e-8)

    rewards = oracle.rewards(as_oracle_pairs(batch), BETA)
    assert result.rewards.chosen.tolist() == pytest.approx(rewards["chosen"], rel=1e-6, abs=1e-6)
    assert result.rewards.rejected.tolist() == pytest.approx(rewards["rejected"], rel=1e-6, abs=1e-6)
    for side, got in (("chosen", result.rewards.weighted_chosen), ("rejected", result.rewards.weighted_rejected)):
        sums = [BETA * oracle.side_sum(pair, side, weighted=True).item() for pair in as_oracle_pairs(batch)]
        assert got.tolist() == pytest.approx(sums, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_beta_is_heeded(beta):
    batch = random_pairs(11, 3)
    expected = oracle.tis_dpo_loss(as_oracle_pairs(batch), beta).item()
    assert losses_of(batch, beta=beta).losses.mean().item() == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- by hand


def test_worked_example():
    """Two pairs, beta = 0.5.

    Pair 0, chosen: m = [1, -0.5], w = [1, 2], so 1 - 1 = 0 weighted and 0.5 plain; rejected: m = [-1], w = [2]:
    -2 and -1. u = 0 - -2 = 2, loss = -log sigmoid(1) = log(1 + e^-1) = 0.31326.
    Pair 1, chosen: m = [0.5], w = [0]: 0 and 0.5; rejected: m = [2, 1], w = [1, 1]: 3 and 3. u = -3,
    loss = log(1 + e^1.5) = 1.70141.
    The gradient by a chosen token's log-prob is -0.5 w sigmoid(-0.5 u), by a rejected one's its negative:
    sigmoid(-1) = 0.26894, sigmoid(1.5) = 0.81757.
    """
    ref_logps = torch.tensor([-2.0, -1.0, -3.0, -1.0, -4.0, -2.0])
    m = torch.tensor([1.0, -0.5, 0.5, -1.0, 2.0, 1.0])
    logps = (ref_logps + m).requires_grad_()
    weights = torch.tensor([1.0, 2.0, 0.0, 2.0, 1.0, 1.0])
    owner = torch.tensor([0, 0, 1, 2, 3, 3])
    result = pair_losses(logps, ref_logps, weights, owner, 2, beta=0.5)
    assert result.losses.tolist() == pytest.approx([0.31326, 1.70141], abs=1e-5)
    assert result.rewards.chosen.tolist() == pytest.approx([0.25, 0.25])
    assert result.rewards.rejected.tolist() == pytest.approx([-0.5, 1.5])
    assert result.rewards.weighted_chosen.tolist() == pytest.approx([0.0, 0.0])
    assert result.rewards.weighted_rejected.tolist() == pytest.approx([-1.0, 1.5])
    result.losses.sum().backward()
    a, b = 0.5 * 0.26894, 0.5 * 0.81757
    assert logps.grad.tolist() == pytest.approx([-a, -2 * a, 0, 2 * a, b, b], abs=1e-5)


def test_sums_go_to_their_response_in_any_token_order():
    """A response without tokens sums to 0."""
    values, owner = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0])
    assert response_sums(values, owner, 4).tolist() == [10.0, 0.0, 5.0, 0.0]


# ---------------------------------------------------------------- properties


def test_swapping_a_pair_negates_its_margins():
    batch = random_pairs(2, 3)
    swapped = losses_of(batch, owner=(batch.owner + 3) % 6)
    result = losses_of(batch)
    plain, weighted = (
        (r.chosen - r.rejected, r.weighted_chosen - r.weighted_rejected) for r in (result.rewards, swapped.rewards)
    )
    for ours, theirs in zip(plain, weighted, strict=True):
        assert torch.equal(ours, -theirs)
    # log sigma(z) - log sigma(-z) = z.
    difference = swapped.losses - result.losses
    assert torch.allclose(difference, result.rewards.weighted_chosen - result.rewards.weighted_rejected, atol=1e-6)


def test_pairs_do_not_touch_each_other():
    batch = random_pairs(5, 3)
    alone = [
        losses_of(
            SimpleNamespace(
                logps=batch.logps[own], ref_logps=batch.ref_logps[own], weights=batch.weights[own],
                owner=batch.owner[own] // 3, count=1,
            )
        ).losses
        for own in ((batch.owner % 3 == b) for b in range(3))
    ]  # fmt: skip
    assert torch.equal(losses_of(batch).losses, torch.cat(alone))


def test_gradient_agrees_with_finite_differences():
    batch = random_pairs(3, 2, torch.float64)

    def mean_loss(logps):
        return losses_of(batch, logps=logps).losses.mean()

    assert torch.autograd.gradcheck(mean_loss, (batch.logps.clone().requires_grad_(),), eps=1e-6, atol=1e-8)


def test_the_gradient_of_a_token_is_proportional_to_its_weight():
    batch = random_pairs(4, 1)
    logps = batch.logps.clone().requires_grad_()
    losses_of(batch, logps=logps).losses.sum().backward()
    per_weight = logps.grad / batch.weights
    chosen = batch.owner == 0
    assert (per_weight[chosen] < 0).all()
    assert torch.allclose(per_weight[chosen], per_weight[0].expand(int(chosen.sum())), rtol=1e-5)
    assert torch.allclose(per_weight[~chosen], -per_weight[0].expand(int((~chosen).sum())), rtol=1e-5)


def test_rewards_carry_no_gradient():
    batch = random_pairs(6, 2)
    result = losses_of(batch, logps=batch.logps.clone().requires_grad_())
    assert result.losses.requires_grad
    assert not any(reward.requires_grad for reward in result.rewards)


@pytest.mark.parametrize(("u", "expected"), [(1e5, 0.0), (-1e5, 1e4)])
def test_far_margins_stay_finite(u, expected):
    u = torch.tensor([u], requires_grad=True)
    loss = dpo_objective(u, BETA)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected)
    assert u.grad.item() == pytest.approx(-BETA if expected else 0.0)
