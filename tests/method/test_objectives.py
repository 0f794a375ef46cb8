"""The preference objectives: DPO to the last bit with unit weights, the oracle within a bound, and by hand.

Bound: float32 losses and rewards agree with the float64 oracle within 1e-6 of their size, the gradient too; those of
IPO, which squares a small difference of sums, within 1e-5.
"""

import doctest
import math
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F

from tisdpo_cli.method import objectives
from tisdpo_cli.method.objectives import OBJECTIVES, pair_losses, resolve_loss, response_sums

BETA = 0.1

CASES = [
    ("dpo", {}),
    ("dpo", {"alpha": 0.5}),
    ("dpo", {"alpha": 1.0, "label_smoothing": 0.2}),
    ("dpo", {"label_smoothing": 0.1}),
    ("dpo", {"reference_free": True}),
    ("ipo", {}),
    ("ipo", {"length_normalize": True}),
    ("tdpo1", {}),
    ("tdpo2", {}),
    ("tdpo2", {"alpha": 2.0}),
]
IDS = ["-".join([name, *params]) for name, params in CASES]


def random_pairs(seed, count, dtype=torch.float32):
    """Log-probs and weights of `count` pairs of 1 to 20 tokens a response, in the layout of `pair_losses`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 21, (2 * count,), generator=generator)
    total = int(lengths.sum())
    draw = torch.rand(4, total, generator=generator, dtype=dtype)
    return SimpleNamespace(
        logps=-6 * draw[0],
        ref_logps=-6 * draw[1],
        weights=0.2 + 2 * draw[2],
        kl=draw[3],
        response_ids=torch.repeat_interleave(torch.arange(2 * count), lengths),
        count=count,
    )


def losses_of(batch, how=None, beta=BETA, **changed):
    """`pair_losses` of a batch, with some of it changed."""
    b = SimpleNamespace(**{**vars(batch), **changed})
    return pair_losses(b.logps, b.ref_logps, b.kl, b.weights, b.response_ids, b.count, how or resolve_loss("dpo", beta))


def as_oracle_pairs(batch):
    """The same pairs as the oracle takes them."""
    pairs = []
    for b in range(batch.count):
        chosen, rejected = batch.response_ids == b, batch.response_ids == batch.count + b
        pairs.append(
            {
                "policy_chosen_logps": batch.logps[chosen],
                "policy_rejected_logps": batch.logps[rejected],
                "reference_chosen_logps": batch.ref_logps[chosen],
                "reference_rejected_logps": batch.ref_logps[rejected],
                "chosen_weights": batch.weights[chosen],
                "rejected_weights": batch.weights[rejected],
                **{f"{who}_chosen_kl": batch.kl[chosen] for who in ("policy", "reference")},
                **{f"{who}_rejected_kl": batch.kl[rejected] for who in ("policy", "reference")},
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
            for t in (batch.response_ids == response).nonzero()[:, 0]:
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
    response_ids = torch.tensor([0, 0, 1, 2, 3, 3])
    result = pair_losses(logps, ref_logps, None, weights, response_ids, 2, resolve_loss("dpo", 0.5))
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
    values, response_ids = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0])
    assert response_sums(values, response_ids, 4).tolist() == [10.0, 0.0, 5.0, 0.0]


# ---------------------------------------------------------------- properties


def test_swapping_a_pair_negates_its_margins():
    batch = random_pairs(2, 3)
    swapped = losses_of(batch, response_ids=(batch.response_ids + 3) % 6)
    result = losses_of(batch)
    plain, weighted = (
        (r.chosen - r.rejected, r.weighted_chosen - r.weighted_rejected) for r in (result.rewards, swapped.rewards)
    )
    for ours, theirs in zip(plain, weighted, strict=True):
        assert torch.equal(ours, -theirs)
    # log sigma(z) - log sigma(-z) = z.
    difference = swapped.losses - result.losses
    assert torch.allclose(difference, result.rewards.weighted_chosen - result.rewards.weighted_rejected, atol=1e-6)


@pytest.mark.parametrize(("name", "params"), CASES, ids=IDS)
def test_pairs_do_not_touch_each_other(name, params):
    batch, how = random_pairs(5, 3), resolve_loss(name, BETA, params)
    alone = [
        losses_of(
            SimpleNamespace(
                logps=batch.logps[own], ref_logps=batch.ref_logps[own], weights=batch.weights[own], kl=batch.kl[own],
                response_ids=batch.response_ids[own] // 3, count=1,
            ),
            how,
        ).losses
        for own in ((batch.response_ids % 3 == b) for b in range(3))
    ]  # fmt: skip
    assert torch.equal(losses_of(batch, how).losses, torch.cat(alone))


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
    chosen = batch.response_ids == 0
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
    logps = torch.tensor([u, 0.0], requires_grad=True)
    one = torch.ones(2)
    value = pair_losses(logps, torch.zeros(2), None, one, torch.tensor([0, 1]), 1, resolve_loss("dpo", BETA)).losses
    value.sum().backward()
    assert value.item() == pytest.approx(expected)
    assert logps.grad[0].item() == pytest.approx(-BETA if expected else 0.0)


# ---------------------------------------------------------------- every objective


def batch_for(name, seed, count, dtype=torch.float32):
    """Random pairs, with unit weights where the objective takes none."""
    batch = random_pairs(seed, count, dtype)
    if not OBJECTIVES[name].takes_weights:
        batch.weights = torch.ones_like(batch.weights)
    return batch


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "params"), CASES, ids=IDS)
def test_every_objective_agrees_with_the_oracle(name, params, seed):
    batch = batch_for(name, seed, 3)
    logps, kl = (values.clone().requires_grad_() for values in (batch.logps, batch.kl))
    exact_logps, exact_kl = (values.double().requires_grad_() for values in (batch.logps, batch.kl))
    got = losses_of(batch, resolve_loss(name, BETA, params), logps=logps, kl=kl).losses
    pairs = as_oracle_pairs(SimpleNamespace(**{**vars(batch), "logps": exact_logps, "kl": exact_kl}))
    expected = torch.stack([oracle.OBJECTIVES[name](pair, BETA, **params) for pair in pairs])
    # IPO squares a difference of sums, which has fewer digits than they.
    bound = 1e-5 if name == "ipo" else 1e-6
    assert torch.allclose(got.double(), expected, rtol=bound, atol=1e-7)
    got.sum().backward()
    expected.sum().backward()
    assert torch.allclose(logps.grad.double(), exact_logps.grad, rtol=2 * bound, atol=1e-7)
    if exact_kl.grad is None:
        assert kl.grad is None or not kl.grad.any()
    else:
        assert torch.allclose(kl.grad.double(), exact_kl.grad, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "params"), CASES, ids=IDS)
def test_every_gradient_agrees_with_finite_differences(name, params):
    """By log-probs and divergences; by those of the chosen responses not in tdpo2, which stops that gradient."""
    batch = batch_for(name, 3, 2, torch.float64)
    how, chosen = resolve_loss(name, BETA, params), batch.response_ids < batch.count

    def mean_loss(logps, chosen_kl, rejected_kl):
        kl = torch.cat([chosen_kl, rejected_kl])
        return losses_of(batch, how, logps=logps, kl=kl).losses.mean()

    given = batch.logps, batch.kl[chosen], batch.kl[~chosen]
    logps, chosen_kl, rejected_kl = (values.clone().requires_grad_() for values in given)
    if name == "tdpo2":
        chosen_kl = chosen_kl.detach()
    assert torch.autograd.gradcheck(mean_loss, (logps, chosen_kl, rejected_kl), eps=1e-6, atol=1e-8)


def one_pair(name, params, beta):
    """The loss of a pair by hand: m = 3 for the chosen (two tokens, 1 and 2), -1 for the rejected token.

    Log-probs -1 and -2 against -5, weights 1; KL 0.25 and 0.5 on the chosen tokens, 2 on the rejected one.
    """
    logps, ref_logps = torch.tensor([-1.0, -2.0, -5.0]), torch.tensor([-2.0, -4.0, -4.0])
    kl, response_ids = torch.tensor([0.25, 0.5, 2.0]), torch.tensor([0, 0, 1])
    return pair_losses(
        logps, ref_logps, kl, torch.ones(3), response_ids, 1, resolve_loss(name, beta, params)
    ).losses.item()


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        # u = 3 + 1 = 4, eta = 0.75 - 2 = -1.25
        ("dpo", {}, math.log1p(math.exp(-2.0))),  # z = 0.5 * 4
        ("dpo", {"alpha": 0.8}, math.log1p(math.exp(-2.5))),  # z = 0.5 * (4 + 1)
        ("dpo", {"label_smoothing": 0.25}, 0.75 * math.log1p(math.exp(-2.0)) + 0.25 * math.log1p(math.exp(2.0))),
        ("dpo", {"reference_free": True}, math.log1p(math.exp(-1.0))),  # z = 0.5 * (-3 + 5)
        ("ipo", {}, 9.0),  # (4 - 1)^2
        ("ipo", {"length_normalize": True}, 2.25),  # (3 / 2 + 1 - 1)^2
        ("tdpo1", {}, math.log1p(math.exp(-1.375))),  # z = 0.5 * (4 - (2 - 0.75))
        ("tdpo2", {}, math.log1p(math.exp(-1.6875))),  # z = 0.5 * (4 - 0.5 * 1.25)
        ("tdpo2", {"alpha": 1.0}, math.log1p(math.exp(-1.375))),
    ],
)
def test_every_objective_by_hand(name, params, expected):
    assert one_pair(name, params, beta=0.5) == pytest.approx(expected, rel=1e-6)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize(
    ("name", "params", "value", "by_logps", "by_kl"),
    [
        # u = (2 * 1 + 0.5 * 2) - 3 * -1 = 6; eta = (2 * 0.25 + 0.5 * 0.5) - 3 * 2 = -5.25; beta 0.5. dL/dz = -sigma(-z)
        # and dz/du = 0.5, so a token's gradient is -0.5 w sigma(-z) if chosen and the negative if rejected.
        # z = 0.5 * 6 = 3
        ("dpo", {}, math.log1p(math.exp(-3)), [g * sigmoid(-3) for g in (-1, -0.25, 1.5)], [0, 0, 0]),
        # z = 0.5 * (6 + 0.8 * 5.25) = 5.1, and by a divergence -0.8 times as much
        (
            "dpo", {"alpha": 0.8}, math.log1p(math.exp(-5.1)),
            [g * sigmoid(-5.1) for g in (-1, -0.25, 1.5)], [g * sigmoid(-5.1) for g in (0.8, 0.2, -1.2)],
        ),
        # -0.75 log sigma(3) - 0.25 log sigma(-3); dL/dz = -0.75 sigma(-3) + 0.25 sigma(3)
        (
            "dpo", {"label_smoothing": 0.25}, 0.75 * math.log1p(math.exp(-3)) + 0.25 * math.log1p(math.exp(3)),
            [g * (0.25 * sigmoid(3) - 0.75 * sigmoid(-3)) for g in (1, 0.25, -1.5)], [0, 0, 0],
        ),
        # u = (2 * -1 + 0.5 * -2) - 3 * -5 = 12, z = 6
        (
            "dpo", {"reference_free": True}, math.log1p(math.exp(-6)),
            [g * sigmoid(-6) for g in (-1, -0.25, 1.5)], [0, 0, 0],
        ),
        # (6 - 1)^2 = 25, 2 (6 - 1) w
        ("ipo", {}, 25.0, [20, 5, -30], [0, 0, 0]),
        # (3 / 2 + 3 / 1 - 1)^2 = 3.5^2 = 12.25; 2 * 3.5 w / T
        ("ipo", {"length_normalize": True}, 12.25, [7, 1.75, -21], [0, 0, 0]),
    ],
)  # fmt: skip
def test_token_weights_by_hand(name, params, value, by_logps, by_kl):
    """The pair of `one_pair` with weights 2, 0.5 and 3."""
    logps, ref_logps = torch.tensor([-1.0, -2.0, -5.0], requires_grad=True), torch.tensor([-2.0, -4.0, -4.0])
    kl = torch.tensor([0.25, 0.5, 2.0], requires_grad=True)
    weights, response_ids = torch.tensor([2.0, 0.5, 3.0]), torch.tensor([0, 0, 1])
    losses = pair_losses(logps, ref_logps, kl, weights, response_ids, 1, resolve_loss(name, 0.5, params)).losses
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([value], rel=1e-5)
    assert logps.grad.tolist() == pytest.approx(by_logps, rel=1e-5)
    assert (torch.zeros(3) if kl.grad is None else kl.grad).tolist() == pytest.approx(by_kl, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "alpha", "by_logps", "by_kl"),
    [
        # z = 1.375: -0.5 sigma(-z) by the chosen log-probs and divergences, plus by the rejected ones
        (
            "tdpo1",
            None,
            [g * sigmoid(-1.375) for g in (-0.5, -0.5, 0.5)],
            [g * sigmoid(-1.375) for g in (-0.5, -0.5, 0.5)],
        ),
        # z = 0.5 * (4 - 0.5 * 1.25) = 1.6875
        ("tdpo2", 0.5, [g * sigmoid(-1.6875) for g in (-0.5, -0.5, 0.5)], [0, 0, 0.25 * sigmoid(-1.6875)]),
        # z = 0.5 * (4 - 2 * 1.25) = 0.75
        ("tdpo2", 2.0, [g * sigmoid(-0.75) for g in (-0.5, -0.5, 0.5)], [0, 0, sigmoid(-0.75)]),
    ],
)
def test_gradients_of_tdpo_by_hand(name, alpha, by_logps, by_kl):
    """The pair of `one_pair`: u = 4, K of the rejected minus K of the chosen response 2 - 0.75 = 1.25, beta 0.5."""
    logps, ref_logps = torch.tensor([-1.0, -2.0, -5.0], requires_grad=True), torch.tensor([-2.0, -4.0, -4.0])
    kl, response_ids = torch.tensor([0.25, 0.5, 2.0], requires_grad=True), torch.tensor([0, 0, 1])
    how = resolve_loss(name, 0.5, {} if alpha is None else {"alpha": alpha})
    pair_losses(logps, ref_logps, kl, torch.ones(3), response_ids, 1, how).losses.sum().backward()
    assert logps.grad.tolist() == pytest.approx(by_logps, rel=1e-5)
    assert kl.grad.tolist() == pytest.approx(by_kl, rel=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_unit_weights_are_ipo_to_the_last_bit(normalize):
    batch = random_pairs(12, 4)
    ours, plain = batch.logps.clone().requires_grad_(), batch.logps.clone().requires_grad_()
    how = resolve_loss("ipo", BETA, {"length_normalize": normalize})
    losses = losses_of(batch, how, logps=ours, weights=torch.ones_like(ours)).losses
    expected = []
    for b in range(batch.count):
        sides = []
        for response in (b, batch.count + b):
            total, tokens = torch.zeros(()), (batch.response_ids == response).nonzero()[:, 0]
            for t in tokens:
                total = total + (plain[t] - batch.ref_logps[t])
            sides.append(total / len(tokens) if normalize else total)
        expected.append((sides[0] - sides[1] - 1 / (2 * BETA)) ** 2)
    assert torch.equal(losses, torch.stack(expected))
    losses.sum().backward()
    torch.stack(expected).sum().backward()
    assert torch.equal(ours.grad, plain.grad)


@pytest.mark.parametrize("params", [{}, {"alpha": 0.5}, {"reference_free": True}], ids=str)
def test_label_smoothing_mixes_in_the_swapped_pair(params):
    batch, smoothing = random_pairs(13, 4), 0.3
    smoothed = losses_of(batch, resolve_loss("dpo", BETA, {**params, "label_smoothing": smoothing})).losses
    how = resolve_loss("dpo", BETA, params)
    right = losses_of(batch, how).losses
    wrong = losses_of(batch, how, response_ids=(batch.response_ids + batch.count) % (2 * batch.count)).losses
    assert torch.allclose(smoothed, (1 - smoothing) * right + smoothing * wrong, rtol=1e-6)


@pytest.mark.parametrize(("name", "params"), CASES, ids=IDS)
def test_rewards_are_the_same_whatever_the_objective(name, params):
    batch = batch_for(name, 14, 3)
    for got, expected in zip(
        losses_of(batch, resolve_loss(name, BETA, params)).rewards, losses_of(batch).rewards, strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("u", [1e5, -1e5])
@pytest.mark.parametrize(("name", "params"), CASES, ids=IDS)
def test_far_margins_stay_finite_and_exact(name, params, u):
    logps, kl = torch.tensor([u, 0.0], requires_grad=True), torch.tensor([1.0, 3.0], requires_grad=True)
    ref_logps, response_ids, one = torch.zeros(2), torch.tensor([0, 1]), torch.ones(2)
    result = pair_losses(logps, ref_logps, kl, one, response_ids, 1, resolve_loss(name, BETA, params)).losses
    result.sum().backward()
    batch = SimpleNamespace(
        logps=logps.detach(), ref_logps=ref_logps, weights=one, kl=kl.detach(), response_ids=response_ids, count=1
    )
    expected = oracle.OBJECTIVES[name](as_oracle_pairs(batch)[0], BETA, **params)
    assert result.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    assert logps.grad.isfinite().all()
    assert kl.grad is None or kl.grad.isfinite().all()


def test_tdpo2_at_alpha_1_has_the_value_of_tdpo1_and_another_gradient():
    batch = batch_for("tdpo1", 7, 3)
    gradients = []
    values = []
    for name, params in (("tdpo1", {}), ("tdpo2", {"alpha": 1.0})):
        logps, kl = batch.logps.clone().requires_grad_(), batch.kl.clone().requires_grad_()
        result = losses_of(batch, resolve_loss(name, BETA, params), logps=logps, kl=kl).losses
        result.sum().backward()
        values.append(result.detach())
        gradients.append((logps.grad, kl.grad))
    chosen = batch.response_ids < batch.count
    assert torch.allclose(*values, rtol=1e-6)
    assert torch.allclose(gradients[0][0], gradients[1][0], rtol=1e-5)
    assert torch.allclose(gradients[0][1][~chosen], gradients[1][1][~chosen], rtol=1e-5)
    assert gradients[0][1][chosen].all()
    assert not gradients[1][1][chosen].any()


def test_without_smoothing_and_penalty_dpo_is_the_same_to_the_last_bit():
    batch = random_pairs(8, 4)

    def value_and_gradient(params):
        logps = batch.logps.clone().requires_grad_()
        losses = losses_of(batch, resolve_loss("dpo", BETA, params), logps=logps).losses
        losses.sum().backward()
        return losses.detach(), logps.grad

    plain = value_and_gradient({})
    for params in ({"label_smoothing": 0.0}, {"alpha": 0.0}, {"reference_free": False}):
        assert all(torch.equal(a, b) for a, b in zip(value_and_gradient(params), plain, strict=True))


@pytest.mark.parametrize(("name", "params"), [case for case in CASES if OBJECTIVES[case[0]].takes_weights])
def test_token_weights_count(name, params):
    batch = random_pairs(9, 2)
    how = resolve_loss(name, BETA, params)
    doubled = losses_of(batch, how, weights=2 * batch.weights).losses
    assert not torch.allclose(losses_of(batch, how).losses, doubled)
    # A token of weight 0 might as well not be there, but for the number of tokens.
    masked = batch.weights.clone()
    masked[0] = 0
    moved = losses_of(batch, how, weights=masked, logps=batch.logps.clone().index_fill_(0, torch.tensor([0]), -1.0))
    assert torch.equal(losses_of(batch, how, weights=masked).losses, moved.losses)


def test_metrics_of_the_divergence_carry_no_weights_and_no_gradient():
    batch = random_pairs(10, 2)
    result = losses_of(batch, resolve_loss("dpo", BETA, {"alpha": 1.0}), kl=batch.kl.clone().requires_grad_())
    assert torch.allclose(result.kl, response_sums(batch.kl, batch.response_ids, 4))
    assert not result.kl.requires_grad
    assert losses_of(batch, kl=None).kl is None


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("dpo", {"alpha": 1.0}, math.log(2)),
        ("dpo", {"label_smoothing": 0.3}, math.log(2)),
        ("dpo", {"reference_free": True}, None),
        ("ipo", {}, 25.0),
        ("tdpo1", {}, math.log(2)),
        ("tdpo2", {}, math.log(2)),
    ],
)
def test_the_value_at_the_start(name, params, expected):
    value = resolve_loss(name, BETA, params).start_value()
    assert value == expected if expected is None else value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize(("name", "params"), CASES, ids=IDS)
def test_the_value_at_the_start_is_that_of_pairs_that_have_not_moved(name, params, beta):
    batch, how = batch_for(name, 15, 3), resolve_loss(name, beta, params)
    losses = losses_of(batch, how, logps=batch.ref_logps, kl=torch.zeros_like(batch.kl)).losses
    if "reference_free" in params:
        assert how.start_value() is None
    else:
        assert losses.tolist() == pytest.approx([how.start_value()] * 3, rel=1e-6)


def test_ipo_starts_at_its_target_squared():
    """(1 / (2 * 0.05))^2 = 100, (1 / (2 * 2))^2 = 0.0625; normalised or not."""
    for params in ({}, {"length_normalize": True}):
        assert resolve_loss("ipo", 0.05, params).start_value() == pytest.approx(100)
        assert resolve_loss("ipo", 2.0, params).start_value() == pytest.approx(0.0625)


def test_what_is_not_given_has_its_default():
    assert resolve_loss("dpo", BETA).params == {"alpha": 0.0, "label_smoothing": 0.0, "reference_free": False}
    assert resolve_loss("ipo", BETA).params == {"length_normalize": False}
    assert resolve_loss("tdpo1", BETA).params == {}
    assert resolve_loss("tdpo2", BETA).params == {"alpha": 0.5}
    assert resolve_loss("dpo", BETA, {"alpha": 1.0}).params["label_smoothing"] == 0.0


def test_an_objective_is_described_by_what_is_not_default():
    assert resolve_loss("dpo", 0.1).describe() == "dpo (β 0.1)"
    assert resolve_loss("dpo", 0.5, {"alpha": 0.25, "label_smoothing": 0.0}).describe() == "dpo (β 0.5, alpha 0.25)"
    assert resolve_loss("ipo", 0.1, {"length_normalize": True}).describe() == "ipo (β 0.1, length_normalize)"


def test_objectives_say_what_they_need():
    def needs(name, **params):
        return resolve_loss(name, BETA, params).needs

    assert needs("dpo") == needs("ipo") == (True, None)
    assert needs("dpo", alpha=0.1) == (True, "policy||reference")
    assert needs("dpo", label_smoothing=0.1) == (True, None)
    assert needs("dpo", reference_free=True) == (False, None)
    assert needs("ipo", length_normalize=True) == (True, None)
    assert needs("tdpo1") == needs("tdpo2") == (True, "reference||policy")
    assert [name for name, entry in OBJECTIVES.items() if entry.takes_weights] == ["dpo", "ipo"]


@pytest.mark.parametrize(
    ("name", "params", "word"),
    [
        ("tdpo", {}, "unknown loss"),
        ("DPO", {}, "unknown loss"),
        ("dpo", {"length_normalize": True}, "no parameter length_normalize"),
        ("ipo", {"alpha": 1.0}, "no parameter alpha"),
        ("tdpo1", {"alpha": 1.0}, "no parameter alpha"),
        ("tdpo2", {"label_smoothing": 0.1}, "no parameter label_smoothing"),
        ("dpo", {"label_smoothing": 0.5}, "below 0.5"),
        ("dpo", {"label_smoothing": -0.1}, "at least 0"),
        ("dpo", {"alpha": -1.0}, "at least 0"),
        ("dpo", {"label_smoothing": 1.0}, "below 0.5"),
        ("dpo", {"label_smoothing": math.nan}, "finite"),
        ("dpo", {"alpha": math.nan}, "finite"),
        ("dpo", {"alpha": math.inf}, "finite"),
        ("tdpo2", {"alpha": 0.0}, "above 0"),
        ("tdpo2", {"alpha": -0.5}, "above 0"),
        ("tdpo2", {"alpha": math.nan}, "finite"),
        ("dpo", {"alpha": 0.5, "reference_free": True}, "reference"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(name, params, word):
    with pytest.raises(ValueError, match=word):
        resolve_loss(name, BETA, params)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(objectives).failed == 0
    assert doctest.testmod(objectives).attempted > 0
