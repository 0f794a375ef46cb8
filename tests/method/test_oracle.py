"""Checks of the oracle itself against numbers worked by hand; the working is in each test.

Knows nothing of the package, as the oracle does.
"""

import math
from types import SimpleNamespace

import oracle
import pytest
import torch

approx = pytest.approx


# ---------------------------------------------------------------- transforms


def test_exp_clamps_r_itself_on_both_sides():
    """L = -0.5, U = 1.5: clamp of [-2, 0, 1, 3] is [-0.5, 0, 1, 1.5].

    chosen: e^-0.5 = 0.60653, 1, e = 2.71828, e^1.5 = 4.48169; rejected: the reciprocals,
    1.64872, 1, 0.36788, 0.22313. (Clamping s = -r would give e^1.5 = 4.48 for the first.)
    """
    r = [-2.0, 0.0, 1.0, 3.0]
    chosen = oracle.transform("exp", r, "chosen")
    assert chosen == approx([0.60653, 1, 2.71828, 4.48169], abs=1e-5)
    rejected = oracle.transform("exp", r, "rejected")
    assert rejected == approx([1.64872, 1, 0.36788, 0.22313], abs=1e-5)


def test_exp_parameters():
    """k = 2, mu = 0.5, L = -1, U = 2: r = 4 -> 2 e^1 = 5.43656; rejected: 2 e^-1 = 0.73576."""
    params = {"k": 2, "mu": 0.5, "L": -1, "U": 2}
    assert oracle.transform("exp", [4.0], "chosen", **params) == approx([5.43656], abs=1e-5)
    assert oracle.transform("exp", [4.0], "rejected", **params) == approx([0.73576], abs=1e-5)


def test_rank_based():
    """[5, -1, 2]: ranks 3, 1, 2 of 1..3 on 0.7..1.3: 1.3, 0.7, 1.0; rejected: mirrored."""
    assert oracle.transform("rank_based", [5, -1, 2], "chosen") == approx([1.3, 0.7, 1.0])
    assert oracle.transform("rank_based", [5, -1, 2], "rejected") == approx([0.7, 1.3, 1.0])
    wide = oracle.transform("rank_based", [5, -1, 2], "chosen", min_scale=0.5, max_scale=1.5)
    assert wide == approx([1.5, 0.5, 1.0])


def test_rank_based_ties_and_a_single_token():
    """[1, 2, 2, 3, 0]: 0 has rank 1, 1 rank 2, the 2s share (3+4)/2 = 3.5, 3 rank 5.

    0.7 + 0.6 (rank - 1)/4: 0.85, 1.075, 1.075, 1.3, 0.7. All equal: rank (1+2+3)/3 = 2 -> 1.0.
    A tie at the top, [0, 1, 1]: ranks 1, 2.5, 2.5 -> 0.7, 0.7 + 0.6 * 0.75 = 1.15.
    A single token gets 1.0, not the middle of [0.1, 0.5].
    """
    tied = oracle.transform("rank_based", [1, 2, 2, 3, 0], "chosen")
    assert tied == approx([0.85, 1.075, 1.075, 1.3, 0.7])
    assert oracle.transform("rank_based", [4, 4, 4], "chosen") == approx([1.0, 1.0, 1.0])
    assert oracle.transform("rank_based", [0, 1, 1], "chosen") == approx([0.7, 1.15, 1.15])
    alone = oracle.transform("rank_based", [9], "chosen", min_scale=0.1, max_scale=0.5)
    assert alone == [1.0]


def test_threshold_and_scale():
    """[-9, -0.75, 0, 9]: clamped -1.5, -0.75, 0, 1.5; a quarter of the way up is 0.85.

    So 0.7, 0.85, 1.0, 1.3; rejected: s = 9, 0.75, 0, -9 -> 1.3, 1.15, 1.0, 0.7.
    -2, 2, 0.5, 1.5 at s = 1: three quarters -> 1.25.
    """
    r = [-9, -0.75, 0, 9]
    name = "threshold_and_scale"
    assert oracle.transform(name, r, "chosen") == approx([0.7, 0.85, 1.0, 1.3])
    assert oracle.transform(name, r, "rejected") == approx([1.3, 1.15, 1.0, 0.7])
    params = {"min_val": -2, "max_val": 2, "min_scale": 0.5, "max_scale": 1.5}
    assert oracle.transform(name, [1], "chosen", **params) == approx([1.25])


def test_threshold_and_origin():
    """threshold clamps s: [-3, 0.25, 2] -> -1, 0.25, 1; rejected s = 3, -0.25, -2 -> 1, -0.25, -1.

    With -0.2 and 0.8 on the rejected side: 0.8, -0.2, -0.2. origin is s.
    """
    r = [-3, 0.25, 2]
    assert oracle.transform("threshold", r, "chosen") == [-1, 0.25, 1]
    assert oracle.transform("threshold", r, "rejected") == [1, -0.25, -1]
    params = {"lower_threshold": -0.2, "upper_threshold": 0.8}
    assert oracle.transform("threshold", r, "rejected", **params) == [0.8, -0.2, -0.2]
    assert oracle.transform("origin", r, "chosen") == [-3, 0.25, 2]
    assert oracle.transform("origin", r, "rejected") == [3, -0.25, -2]


def test_binary():
    """n = 5 at 50%: floor(2.5) = 2. [3, 1, 4, 2, 5]: 5 and 4; rejected: the smallest, 1 and 2.

    1%: floor(0.05) = 0 -> 1 token. Ties: [2, 2, 2, 1] at 50%, k = 2, all three 2s are in.
    29% of 100 is 29 and 18.4% of 375 is 69 (floats give 28.99... or 68.99...). Default: all.
    """
    r = [3, 1, 4, 2, 5]
    assert oracle.transform("binary", r, "chosen", top_percent=50) == [0, 0, 1, 0, 1]
    assert oracle.transform("binary", r, "rejected", top_percent=50) == [0, 1, 0, 1, 0]
    assert oracle.transform("binary", r, "chosen", top_percent=1) == [0, 0, 0, 0, 1]
    assert oracle.transform("binary", [2, 2, 2, 1], "chosen", top_percent=50) == [1, 1, 1, 0]
    assert oracle.binary_count(100, 29) == 29
    assert oracle.binary_count(375, 18.4) == 69
    assert oracle.transform("binary", r, "chosen") == [1] * 5


@pytest.mark.parametrize("name", oracle.TRANSFORMS)
def test_an_empty_response_has_no_weights(name):
    assert oracle.transform(name, [], "chosen") == []


# ---------------------------------------------------------------- response_weights


def test_transform_comes_before_the_cut():
    """Ranks of [0, 1, 2, 3] are 1..4 -> 0.7, 0.9, 1.1, 1.3; two kept: 0.7, 0.9 (not 0.7, 1.3)."""
    weights = oracle.response_weights("rank_based", [0, 1, 2, 3], "chosen", kept=2, has_eos=False)
    assert weights == approx([0.7, 0.9])


def test_normalize_divides_by_the_mean_of_the_kept_tokens():
    """0.7, 0.9 have mean 0.8: 0.875, 1.125."""
    weights = oracle.response_weights("rank_based", [0, 1, 2, 3], "chosen", kept=2, has_eos=False, normalize="mean")
    assert weights == approx([0.875, 1.125])


@pytest.mark.parametrize(("eos_weight", "last"), [("zero", 0.0), ("one", 1.0), ("score", 1.3)])
def test_eos_is_set_last(eos_weight, last):
    """[0, 1, 2] -> 0.7, 1.0, 1.3, unchanged by the EOS. EOS 9 is the 4th of 4: 1.3."""
    weights = oracle.response_weights(
        "rank_based", [0, 1, 2], "chosen", eos_score=9, kept=3, has_eos=True, eos_weight=eos_weight
    )
    assert weights == approx([0.7, 1.0, 1.3, last])


def test_eos_score_is_divided_by_the_tokens_mean_but_one_is_not():
    """exp with L = 0, U = ln 4 on [0, ln 2, ln 3]: 1, 2, 3, mean 2 -> 0.5, 1, 1.5.

    EOS ln 4: 4 / 2 = 2; with the EOS in the mean it would be 4 / 2.5.
    """
    r = [0, math.log(2), math.log(3)]
    common = {"eos_score": math.log(4), "kept": 3, "has_eos": True, "normalize": "mean"}
    common |= {"L": 0, "U": math.log(4)}
    scored = oracle.response_weights("exp", r, "chosen", eos_weight="score", **common)
    assert scored == approx([0.5, 1.0, 1.5, 2.0])
    one = oracle.response_weights("exp", r, "chosen", eos_weight="one", **common)
    assert one == approx([0.5, 1.0, 1.5, 1.0])


def test_eos_score_on_the_rejected_side():
    """s = [-1, -2, -3], EOS r = -1.5 -> s = 1.5, the largest of 4; at 50% k = 2, so it is in.

    The tokens without it: k = floor(1.5) = 1, so only the first.
    """
    weights = oracle.response_weights(
        "binary", [1, 2, 3], "rejected",
        eos_score=-1.5, kept=3, has_eos=True, eos_weight="score", top_percent=50,
    )  # fmt: skip
    assert weights == [1, 0, 0, 1]


def test_unscored_tokens_take_no_part_and_may_not_be_kept():
    """[3, 1, None]: ranks among two, 1.3 and 0.7."""
    weights = oracle.response_weights("rank_based", [3, 1, None], "chosen", kept=2, has_eos=False)
    assert weights == approx([1.3, 0.7])
    with pytest.raises(ValueError, match="no score"):
        oracle.response_weights("rank_based", [3, 1, None], "chosen", kept=3, has_eos=False)


# ---------------------------------------------------------------- log-probs and scores


class Bigram(torch.nn.Module):
    """A model over 3 tokens whose next-token probabilities are the rows of a table."""

    def __init__(self, rows):
        super().__init__()
        logits = torch.tensor(rows, dtype=torch.float64).log() + 5.0  # logits are free up to +c
        self.table = torch.nn.Parameter(logits)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids])


FORWARD = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.8, 0.1, 0.1]]
REVERSE = [[0.25, 0.5, 0.25], [0.1, 0.2, 0.7], [0.2, 0.4, 0.4]]


def test_token_logps():
    """Prompt [2, 0], response [1, 2, 0]: p(1|0) = 0.25, p(2|1) = 0.7, p(0|2) = 0.8."""
    logps = oracle.token_logps(Bigram(FORWARD), [2, 0], [1, 2, 0])
    assert logps.dtype == torch.float64
    assert logps.exp().tolist() == approx([0.25, 0.7, 0.8])


def test_token_logps_gradient():
    """d log p(1|0) / d logits of row 0 = onehot(1) - p = [-0.5, 0.75, -0.25]; other rows 0."""
    model = Bigram(FORWARD)
    oracle.token_logps(model, [0], [1]).sum().backward()
    expected = [[-0.5, 0.75, -0.25], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(model.table.grad, torch.tensor(expected, dtype=torch.float64))


def test_scores():
    """r = log(0.25/0.5), log(0.7/0.7), log(0.8/0.2) = -ln 2, 0, ln 4."""
    r = oracle.scores(Bigram(FORWARD), Bigram(REVERSE), [2, 0], [1, 2, 0])
    assert r.tolist() == approx([-math.log(2), 0, math.log(4)])
    assert not r.requires_grad


# ---------------------------------------------------------------- losses and rewards


def make_pair(**changes):
    """m chosen = [1, 2], m rejected = [-1, 0.5, 2]; sums 3 and 1.5, weighted 4 and -1."""
    pair = {
        "policy_chosen_logps": [-1, -2],
        "reference_chosen_logps": [-2, -4],
        "chosen_weights": [2, 1],
        "policy_rejected_logps": [-3, -1, -1],
        "reference_rejected_logps": [-2, -1.5, -3],
        "rejected_weights": [1, 0, 0],
    }
    return pair | changes


def test_response_sum():
    """2 * 1 + 1 * 2 = 4; 1 * -1 + 0 + 0 = -1."""
    assert oracle.response_sum([-1, -2], [-2, -4], [2, 1]).item() == 4
    assert oracle.response_sum([-3, -1, -1], [-2, -1.5, -3], [1, 0, 0]).item() == -1


def test_losses():
    """dpo: u = 1.5, beta 2: log(1 + e^-3) = 0.0485874. tis: u = 4 - -1 = 5: log(1 + e^-10).

    With all weights 1 they agree; with u = 0 the loss is ln 2; the mean is over pairs.
    """
    still = make_pair(reference_chosen_logps=[-1, -2], reference_rejected_logps=[-3, -1, -1])
    ones = make_pair(chosen_weights=[1, 1], rejected_weights=[1, 1, 1])
    assert oracle.dpo_loss([make_pair()], 2).item() == approx(0.0485874, abs=1e-7)
    assert oracle.tis_dpo_loss([make_pair()], 2).item() == approx(4.5398899e-5, rel=1e-7)
    assert oracle.tis_dpo_loss([ones], 2).item() == oracle.dpo_loss([ones], 2).item()
    assert oracle.tis_dpo_loss([still]).item() == approx(math.log(2), abs=1e-15)
    both = oracle.dpo_loss([make_pair(), still], 2).item()
    assert both == approx((0.0485874 + 0.6931472) / 2, abs=1e-7)


def test_loss_far_out_is_finite():
    """-log sigma(-1000) = 1000 + log(1 + e^-1000) = 1000; at +1000 it is 0."""
    far = torch.tensor([-1000.0, 1000.0], dtype=torch.float64)
    assert oracle.minus_log_sigmoid(far).tolist() == [1000.0, 0.0]


def test_tis_dpo_gradient():
    """dL/d log pi(y_t chosen) = -beta w_t sigma(-beta u); at u = 0, beta = 0.1: -0.05 w_t.

    On the rejected side +0.05 w_t.
    """
    chosen = torch.tensor([-2.0, -4.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-2.0, -1.5, -3.0], dtype=torch.float64, requires_grad=True)
    pair = make_pair(policy_chosen_logps=chosen, policy_rejected_logps=rejected)
    oracle.tis_dpo_loss([pair], 0.1).backward()
    assert chosen.grad.tolist() == approx([-0.1, -0.05])
    assert rejected.grad.tolist() == approx([0.05, 0.0, 0.0])


def test_rewards_are_unweighted():
    """beta 0.1: 0.3, 0.15, margin 0.15, right; a pair that has not moved: 0, 0, 0 and not right."""
    still = make_pair(reference_chosen_logps=[-1, -2], reference_rejected_logps=[-3, -1, -1])
    result = oracle.rewards([make_pair(), still], 0.1)
    assert result["chosen"] == approx([0.3, 0])
    assert result["rejected"] == approx([0.15, 0])
    assert result["margins"] == approx([0.15, 0])
    assert result["accuracies"] == [1.0, 0.0]


# ---------------------------------------------------------------- divergences and the other objectives

HALF = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]
MOST = [[0.125, 0.75, 0.125], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]
LN2, LN3 = math.log(2), math.log(3)


def test_divergence_in_both_directions():
    """p = 1/2, 1/4, 1/4 and q = 1/8, 3/4, 1/8; after tokens 1 and 2 the models agree.

    KL(p || q) = 1/2 ln 4 + 1/4 ln(1/3) + 1/4 ln 2 = 5/4 ln 2 - 1/4 ln 3 = 0.591781.
    KL(q || p) = 1/8 ln(1/4) + 3/4 ln 3 + 1/8 ln(1/2) = 3/4 ln 3 - 3/8 ln 2 = 0.564029.
    Prompt [2, 0], response [1, 2, 0]: predicted after 0, 1 and 2.
    """
    forward, backward = oracle.token_kls(Bigram(HALF), Bigram(MOST), [2, 0], [1, 2, 0])
    assert forward.dtype == backward.dtype == torch.float64
    assert forward.tolist() == approx([1.25 * LN2 - 0.25 * LN3, 0, 0], abs=1e-15)
    assert backward.tolist() == approx([0.75 * LN3 - 0.375 * LN2, 0, 0], abs=1e-15)


@pytest.mark.parametrize(
    ("direction", "gradient"),
    [
        # p_v (ln(p_v / q_v) - KL), with ln(p / q) = 2 ln 2, -ln 3, ln 2 and KL = 0.591781
        (0, [0.397257, -0.422598, 0.025341]),
        # p - q
        (1, [0.375, -0.5, 0.125]),
    ],
)
def test_gradient_of_a_divergence_is_the_policys_alone(direction, gradient):
    policy, reference = Bigram(HALF), Bigram(MOST)
    oracle.token_kls(policy, reference, [0], [1])[direction].sum().backward()
    assert policy.table.grad[0].tolist() == approx(gradient, abs=1e-6)
    assert not policy.table.grad[1:].any()
    assert reference.table.grad is None


def with_kl(**changes):
    """`make_pair` with divergences. Weighted, policy: 2 * 0.5 + 1 * 1 = 2 and 1 * 1 + 0 + 0 = 1.

    Reference, plain: 0.25 + 0.75 = 1 and 1 + 2 + 0.5 = 3.5.
    """
    pair = make_pair() | {
        "policy_chosen_kl": [0.5, 1],
        "policy_rejected_kl": [1, 3, 5],
        "reference_chosen_kl": [0.25, 0.75],
        "reference_rejected_kl": [1, 2, 0.5],
    }
    return pair | changes


def test_eta():
    """2 - 1."""
    assert oracle.eta(with_kl()).item() == 1


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        # u = 4 + 1 = 5 weighted, 3 - 1.5 = 1.5 plain; beta = 0.4; log(1 + e^-2) = 0.1269280
        ("dpo", {}, 0.1269280),  # z = 0.4 * 5 = 2
        ("dpo", {"alpha": 0.5}, 0.1529776),  # z = 0.4 * (5 - 0.5 * 1) = 1.8
        ("dpo", {"label_smoothing": 0.1}, 0.3269280),  # 0.9 * 0.1269280 + 0.1 * 2.1269280
        ("dpo", {"alpha": 0.5, "label_smoothing": 0.1}, 0.3329776),  # 0.9 * 0.1529776 + 0.1 * 1.9529776
        ("dpo", {"reference_free": True}, 0.9130153),  # u = (-2 - 2) - (-3) = -1, z = -0.4
        ("ipo", {}, 14.0625),  # (5 - 1.25)^2
        ("ipo", {"length_normalize": True}, 1.1736111),  # (4 / 2 + 1 / 3 - 1.25)^2 = (13 / 12)^2
        ("tdpo1", {}, 0.9130153),  # z = 0.4 * (1.5 - (3.5 - 1)) = -0.4
        ("tdpo2", {}, 0.6443967),  # z = 0.4 * (1.5 - 0.5 * 2.5) = 0.1
        ("tdpo2", {"alpha": 1.0}, 0.9130153),
    ],
)
def test_objectives(name, params, expected):
    assert oracle.OBJECTIVES[name](with_kl(), 0.4, **params).item() == approx(expected, abs=1e-7)


def test_the_plain_objective_is_the_method():
    assert oracle.OBJECTIVES["dpo"](with_kl(), 0.4).item() == oracle.tis_dpo_loss([with_kl()], 0.4).item()


@pytest.mark.parametrize(
    ("name", "kind", "chosen", "rejected"),
    [
        # z = 0.4 * (5 - 1) = 1.6 and sigma(-1.6) = 0.1679816: dL/dKL_t = 0.4 w_t sigma(-z), minus if rejected
        ("dpo", "policy", [0.1343853, 0.0671926], [-0.0671926, 0, 0]),
        # z = -0.4 and sigma(0.4) = 0.5986877: dL/dKL_t = -0.4 sigma(-z), plus if rejected
        ("tdpo1", "reference", [-0.2394751] * 2, [0.2394751] * 3),
        # the same value, and the chosen divergence stopped
        ("tdpo2", "reference", [0, 0], [0.2394751] * 3),
    ],
)
def test_gradients_of_the_penalties(name, kind, chosen, rejected):
    """All with alpha = 1."""
    keys = [f"{kind}_{side}_kl" for side in ("chosen", "rejected")]
    pair = with_kl()
    kls = [torch.tensor(pair[key], dtype=torch.float64, requires_grad=True) for key in keys]
    params = {} if name == "tdpo1" else {"alpha": 1.0}
    oracle.OBJECTIVES[name](pair | dict(zip(keys, kls, strict=True)), 0.4, **params).backward()
    for kl, expected in zip(kls, (chosen, rejected), strict=True):
        got = torch.zeros_like(kl) if kl.grad is None else kl.grad
        assert got.tolist() == approx(expected, abs=1e-7)


# ---------------------------------------------------------------- truncation

BOS, EOS = 100, 200
PROMPT, CHOSEN, REJECTED = [1, 2, 3, 4, 5], [11, 12, 13], [21]


def cut(max_length, max_prompt_length, bos=BOS, keep="end"):
    """encode_and_cut of the rows above, as (prompt, chosen, rejected) and the whole dict."""
    row = oracle.encode_and_cut(
        PROMPT, CHOSEN, REJECTED, bos=bos, eos=EOS, keep=keep,
        max_length=max_length, max_prompt_length=max_prompt_length,
    )  # fmt: skip
    return row["prompt"], row["chosen"], row["rejected"], row


def test_what_fits_is_not_cut():
    """6 + 4 = 10 <= 10: the prompt stays although it is longer than max_prompt_length."""
    prompt, chosen, rejected, row = cut(10, 3)
    assert prompt == [BOS, 1, 2, 3, 4, 5]
    assert (chosen, rejected) == ([11, 12, 13, EOS], [21, EOS])
    assert (row["chosen_has_eos"], row["rejected_has_eos"]) == (True, True)
    assert (row["chosen_kept"], row["rejected_kept"]) == (3, 1)


def test_one_too_many_cuts_the_prompt_to_its_end_or_start():
    """10 > 9: the prompt to 3 with the BOS in the 3; 6 left for 4 and 2, nothing else cut."""
    prompt, chosen, rejected, _ = cut(9, 3)
    assert prompt == [BOS, 4, 5]
    assert (chosen, rejected) == ([11, 12, 13, EOS], [21, EOS])
    assert cut(9, 3, keep="start")[0] == [BOS, 1, 2]
    assert cut(8, 3, bos=None)[0] == [3, 4, 5]
    assert cut(8, 3, bos=None, keep="start")[0] == [1, 2, 3]
    assert cut(9, 1)[0] == [BOS]


def test_a_cut_response_has_no_eos():
    """Prompt 3, max_length 5: 2 left. chosen 4 -> 11, 12; rejected 2 fits with its EOS."""
    prompt, chosen, rejected, row = cut(5, 3)
    assert prompt == [BOS, 4, 5]
    assert (chosen, rejected) == ([11, 12], [21, EOS])
    assert (row["chosen_has_eos"], row["rejected_has_eos"]) == (False, True)
    assert (row["chosen_kept"], row["rejected_kept"]) == (2, 1)


def test_a_response_that_loses_only_its_eos_is_cut():
    """Prompt 3, max_length 6: 3 left for 11, 12, 13 and the EOS."""
    _, chosen, _, row = cut(6, 3)
    assert chosen == [11, 12, 13]
    assert (row["chosen_has_eos"], row["chosen_kept"]) == (False, 3)


def test_a_short_prompt_is_not_cut_and_no_room_keeps_nothing():
    """Prompt 6 <= 20 stays; max_length 6 leaves 0 for the responses, and 4 leaves less."""
    for max_length in (6, 4):
        prompt, chosen, rejected, row = cut(max_length, 20)
        assert prompt == [BOS, 1, 2, 3, 4, 5]
        assert (chosen, rejected) == ([], [])
        assert (row["chosen_kept"], row["rejected_kept"]) == (0, 0)
        assert not row["chosen_has_eos"]
        assert not row["rejected_has_eos"]
