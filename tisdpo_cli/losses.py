"""The preference loss as pure maths on per-token log-probs. It knows no model, no batch layout and no device.

Shapes: B pairs, N scored tokens of a microbatch, all responses one after the other. `owner` [N] names the
response of each token: pair b has its chosen response at b and its rejected response at B + b.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rewards(NamedTuple):
    """β Σ_t m_t of both responses (unweighted), and the same with token weights. All [B], detached."""

    chosen: Tensor
    rejected: Tensor
    weighted_chosen: Tensor
    weighted_rejected: Tensor


class PairLosses(NamedTuple):
    """The loss of each pair [B] (with gradient) and its rewards."""

    losses: Tensor
    rewards: Rewards


def response_sums(values: Tensor, owner: Tensor, responses: int) -> Tensor:
    """Sum per-token values [N] into one value per response [responses]."""
    return values.new_zeros(responses).index_add(0, owner, values)


def dpo_objective(u: Tensor, beta: float) -> Tensor:
    """`−log σ(β u)` per pair (the objective of TIS-DPO without η; that of DPO when all weights are 1).

    >>> round(dpo_objective(torch.zeros(1), beta=0.1).item(), 4)
    0.6931
    >>> round(dpo_objective(torch.tensor([10.0]), beta=0.1).item(), 4)  # log(1 + e^-1)
    0.3133
    """
    return -F.logsigmoid(beta * u)


def pair_losses(
    logps: Tensor, ref_logps: Tensor, weights: Tensor, owner: Tensor, pairs: int, beta: float
) -> PairLosses:
    """The token-weighted DPO loss of B pairs.

    `m_t = log π_θ(y_t|·) − log π_ref(y_t|·)`, `u = Σ_t w_t m_t (chosen) − Σ_t w_t m_t (rejected)`. With all
    weights 1 this is DPO, to the last bit.

    Args:
        logps: [N] float32 log-probs of the response tokens under the policy, in nats.
        ref_logps: [N] the same under the reference, without gradient.
        weights: [N] token weights, without gradient.
        owner: [N] int64, the response of each token, in [0, 2B).
        pairs: B; given, so that no device has to be asked for it.
        beta: the strength β > 0 of the tie to the reference.
    """
    log_ratios = logps - ref_logps
    weighted = response_sums(weights * log_ratios, owner, 2 * pairs)
    with torch.no_grad():
        plain = beta * response_sums(log_ratios, owner, 2 * pairs)
        scaled = beta * weighted
    rewards = Rewards(plain[:pairs], plain[pairs:], scaled[:pairs], scaled[pairs:])
    return PairLosses(dpo_objective(weighted[:pairs] - weighted[pairs:], beta), rewards)
