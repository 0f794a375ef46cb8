"""Preference objectives on per-token log-probs. Knows no model, no batch layout and no device.

Shapes: B pairs, N scored tokens of a microbatch, concatenated response after response. `response_ids` [N] maps each
token to its response: b for the chosen response of pair b, B + b for the rejected one.

A new objective is one function and one entry in `OBJECTIVES`. This module never imports torch at the top, so that the
settings can read names, parameters and defaults without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tisdpo_cli.method.params import Param, Value, describe_params, resolve_params

if TYPE_CHECKING:
    from torch import Tensor

# The KL divergence that an objective reads at each position.
Divergence = Literal["policy||reference", "reference||policy"]


class Side(NamedTuple):
    """Weighted sums over the tokens of one response of each pair, all [B], in nats.

    Attributes:
        log_ratios: Σ w_t m_t, `m_t = log π_θ(y_t|·) − log π_ref(y_t|·)`.
        logps: Σ w_t log π_θ(y_t|·).
        kl: Σ w_t KL_t, zero if the objective needs no divergence.
        tokens: number of tokens, unweighted.
    """

    log_ratios: Tensor
    logps: Tensor
    kl: Tensor
    tokens: Tensor


class Rewards(NamedTuple):
    """β Σ_t m_t of both responses, unweighted and weighted. All [B], detached."""

    chosen: Tensor
    rejected: Tensor
    weighted_chosen: Tensor
    weighted_rejected: Tensor


class PairLosses(NamedTuple):
    """The loss of each pair [B] with gradient, its rewards, and Σ_t KL_t of all 2B responses if computed."""

    losses: Tensor
    rewards: Rewards
    kl: Tensor | None


Function = Callable[[Side, Side, float, Mapping[str, Any]], "Tensor"]


class Requirements(NamedTuple):
    """What an objective needs under given parameters, besides the log-probs of the policy.

    Attributes:
        reference: the log-probs under the reference model. (The metrics `rewards/*` always need them.)
        divergence: the KL divergence to the reference's full distribution, or None.
    """

    reference: bool = True
    divergence: Divergence | None = None


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        function: maps (chosen, rejected, β, parameters) to the loss of each pair [B].
        help: formula.
        params: parameters by name.
        needs: what it needs under given parameters.
        takes_weights: whether it can use token weights.
        start: formula of its value if the policy equals the reference.
    """

    function: Function
    help: str
    params: Mapping[str, Param] = field(default_factory=dict)
    needs: Callable[[Mapping[str, Any]], Requirements] = lambda _params: Requirements()
    takes_weights: bool = True
    start: str = "ln 2"


def _minus_log_sigmoid(z: Tensor) -> Tensor:
    import torch.nn.functional as F

    return -F.logsigmoid(z)


def _dpo(chosen: Side, rejected: Side, beta: float, p: Mapping[str, Any]) -> Tensor:
    """TIS-DPO, with η if α > 0; with unit weights DPO (Rafailov et al. 2023, Eq. 7); ε as in cDPO (Mitchell)."""
    u = chosen.logps - rejected.logps if p["reference_free"] else chosen.log_ratios - rejected.log_ratios
    if p["alpha"]:
        u = u - p["alpha"] * (chosen.kl - rejected.kl)
    loss = _minus_log_sigmoid(beta * u)
    # −(1−ε) log σ(z) − ε log σ(−z), by log σ(z) − log σ(−z) = z.
    return loss + p["label_smoothing"] * (beta * u) if p["label_smoothing"] else loss


def _ipo(chosen: Side, rejected: Side, beta: float, p: Mapping[str, Any]) -> Tensor:
    """IPO (Azar et al. 2023, Eq. 17); `length_normalize` takes per-token means as TRL does."""
    if p["length_normalize"]:
        u = chosen.log_ratios / chosen.tokens - rejected.log_ratios / rejected.tokens
    else:
        u = chosen.log_ratios - rejected.log_ratios
    return (u - 1 / (2 * beta)) ** 2


def _tdpo1(chosen: Side, rejected: Side, beta: float, _p: Mapping[str, Any]) -> Tensor:
    """TDPO₁ (Zeng et al. 2024)."""
    return _minus_log_sigmoid(beta * (chosen.log_ratios - rejected.log_ratios - (rejected.kl - chosen.kl)))


def _tdpo2(chosen: Side, rejected: Side, beta: float, p: Mapping[str, Any]) -> Tensor:
    """TDPO₂ (Zeng et al. 2024); the KL of the chosen response gets no gradient."""
    margin = rejected.kl - chosen.kl.detach()
    return _minus_log_sigmoid(beta * (chosen.log_ratios - rejected.log_ratios - p["alpha"] * margin))


def _dpo_needs(p: Mapping[str, Any]) -> Requirements:
    return Requirements(not p["reference_free"], "policy||reference" if p["alpha"] else None)


def _tdpo_needs(_params: Mapping[str, Any]) -> Requirements:
    return Requirements(divergence="reference||policy")


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(
        _dpo,
        "−log σ(β(u − αη))",
        {
            "alpha": Param(0.0, "weight α of the KL term", at_least=0.0),
            "label_smoothing": Param(0.0, "probability ε that a label is wrong", at_least=0.0, under=0.5),
            "reference_free": Param(False, "drop the reference model from the loss"),
        },
        needs=_dpo_needs,
    ),
    "ipo": Objective(
        _ipo,
        "(u − 1/(2β))²",
        {"length_normalize": Param(False, "average log-ratios over tokens instead of summing them")},
        start="1/(2β)²",
    ),
    "tdpo1": Objective(_tdpo1, "−log σ(β(u − (K_l − K_w)))", needs=_tdpo_needs, takes_weights=False),
    "tdpo2": Objective(
        _tdpo2,
        "−log σ(β(u − α(K_l − sg(K_w))))",
        {"alpha": Param(0.5, "weight α of the KL term", above=0.0)},
        needs=_tdpo_needs,
        takes_weights=False,
    ),
}


@dataclass(frozen=True)
class Loss:
    """An objective with β and all its parameters, as resolved by `resolve_loss`."""

    name: str
    beta: float
    params: Mapping[str, Any]

    @property
    def objective(self) -> Objective:
        """The entry of the registry."""
        return OBJECTIVES[self.name]

    @property
    def needs(self) -> Requirements:
        """What it needs besides the log-probs of the policy."""
        return self.objective.needs(self.params)

    def start_value(self) -> float | None:
        """Return the loss if the policy equals the reference, or None if it does not use the reference."""
        import torch

        if not self.needs.reference:
            return None
        zero = torch.zeros(1, dtype=torch.float64)
        side = Side(zero, zero, zero, torch.ones_like(zero))
        return float(self.objective.function(side, side, self.beta, self.params))

    def describe(self) -> str:
        """`dpo (β 0.1, alpha 0.5)`: β and the parameters that are not 0."""
        params = describe_params({name: value for name, value in self.params.items() if value})
        return f"{self.name} (β {self.beta:g}{', ' + params if params else ''})"


def resolve_loss(name: str, beta: float, params: Mapping[str, Value] | None = None) -> Loss:
    """Look up an objective and complete its parameters with its defaults.

    Args:
        name: a key of `OBJECTIVES`.
        beta: KL penalty coefficient β.
        params: values that override the defaults.

    Raises:
        ValueError: an unknown name, a parameter that the objective does not have, a value out of bounds, or
            conflicting parameters.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown loss {name!r}; choose from {', '.join(OBJECTIVES)}")
    resolved = resolve_params(f"loss {name}", OBJECTIVES[name].params, params or {})
    if resolved.get("reference_free") and resolved.get("alpha"):
        raise ValueError("reference_free and alpha conflict: alpha needs the reference; set only one of them")
    return Loss(name, beta, resolved)


def response_sums(values: Tensor, response_ids: Tensor, responses: int) -> Tensor:
    """Sum per-token values [N] into one value per response [responses]."""
    return values.new_zeros(responses).index_add(0, response_ids, values)


def pair_losses(
    logps: Tensor, ref_logps: Tensor, kl: Tensor | None, weights: Tensor, response_ids: Tensor, pairs: int, loss: Loss
) -> PairLosses:
    """Compute the loss of B pairs with token weights. With unit weights, dpo is DPO to the last bit.

    >>> import torch
    >>> policy, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -2.0])
    >>> response_ids, weights = torch.tensor([0, 0, 1]), torch.tensor([2.0, 1.0, 0.5])
    >>> loss = resolve_loss("dpo", beta=0.4)  # u = 2 · 1 + 1 · 0 − 0.5 · (−1) = 2.5, and log(1 + e^−1) = 0.3133
    >>> round(pair_losses(policy, reference, None, weights, response_ids, 1, loss).losses.item(), 4)
    0.3133

    Args:
        logps: [N] float32 log-probs of the response tokens under the policy, in nats.
        ref_logps: [N] log-probs under the reference, without gradient.
        kl: [N] divergence that the objective needs at each token, with gradient, or None.
        weights: [N] token weights, without gradient.
        response_ids: [N] int64, the response of each token, in [0, 2B).
        pairs: B, an argument so that no device synchronizes to find it.
        loss: objective with its parameters.
    """
    log_ratios = logps - ref_logps

    def sums(values: Tensor) -> Tensor:
        return response_sums(values, response_ids, 2 * pairs)

    weighted = sums(weights * log_ratios)
    weighted_logps = sums(weights * logps)
    penalty = weighted.new_zeros(2 * pairs) if kl is None else sums(weights * kl)
    tokens = sums(weights.new_ones(weights.shape))
    chosen, rejected = (
        Side(weighted[side], weighted_logps[side], penalty[side], tokens[side])
        for side in (slice(0, pairs), slice(pairs, None))
    )
    losses = loss.objective.function(chosen, rejected, loss.beta, loss.params)
    unweighted_rewards, weighted_rewards = (loss.beta * total.detach() for total in (sums(log_ratios), weighted))
    rewards = Rewards(
        unweighted_rewards[:pairs], unweighted_rewards[pairs:], weighted_rewards[:pairs], weighted_rewards[pairs:]
    )
    return PairLosses(losses, rewards, None if kl is None else sums(kl.detach()))
