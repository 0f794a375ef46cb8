"""A second, independent implementation of the method, for the tests to compare with.

Written from DESIGN.md sections 1 and 2 alone. Plain, dense, slow and in float64: one sequence
at a time, explicit loops, no batching, no padding, no packing. It knows nothing of the package
and must never import it; it validates no settings and reads no files.

Scores are r_t = log pi+ - log pi- throughout (not the sign of the scored-dataset file).
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import torch

Side = Literal["chosen", "rejected"]


# ---------------------------------------------------------------- weights


def signed_scores(scores: Sequence[float], side: Side) -> list[float]:
    """s_t = r_t for a chosen response, s_t = -r_t for a rejected one."""
    if side == "chosen":
        return [float(r) for r in scores]
    if side == "rejected":
        return [-float(r) for r in scores]
    raise ValueError(f"side is {side!r}, not 'chosen' or 'rejected'")


def clamp(value: float, low: float, high: float) -> float:
    """The nearest number to `value` in [low, high]."""
    return min(max(value, low), high)


def rescale(value: float, old: tuple[float, float], new: tuple[float, float]) -> float:
    """The line that takes old[0] to new[0] and old[1] to new[1], at `value`."""
    fraction = (value - old[0]) / (old[1] - old[0])
    return new[0] + fraction * (new[1] - new[0])


def transform_exp(
    scores: Sequence[float],
    side: Side,
    *,
    k: float = 1.0,
    mu: float = 1.0,
    L: float = -0.5,
    U: float = 1.5,
) -> list[float]:
    """w_t = k exp(+mu clamp(r_t, L, U)) if chosen, k exp(-mu clamp(r_t, L, U)) if rejected.

    The paper's Eq. 19. It is r itself that is clamped, on both sides.
    """
    sign = {"chosen": 1.0, "rejected": -1.0}[side]
    return [k * math.exp(sign * mu * clamp(float(r), L, U)) for r in scores]


def mean_rank(value: float, values: Sequence[float]) -> float:
    """The rank of `value` from 1 (smallest) to n; equal values share the mean of their ranks.

    With b values below and e equal (itself included) they hold the ranks b+1 .. b+e,
    whose mean is b + (e + 1) / 2.
    """
    below = sum(1 for other in values if other < value)
    equal = sum(1 for other in values if other == value)
    return below + (equal + 1) / 2


def transform_rank_based(
    scores: Sequence[float], side: Side, *, min_scale: float = 0.7, max_scale: float = 1.3
) -> list[float]:
    """w_t: rank of s_t on the line rank 1 -> min_scale, rank n -> max_scale; 1.0 if n = 1.

    The line is fixed by 1 and n, so a tie at an end does not reach that end of the range.
    """
    s = signed_scores(scores, side)
    if len(s) == 1:
        return [1.0]
    return [rescale(mean_rank(v, s), (1, len(s)), (min_scale, max_scale)) for v in s]


def transform_threshold_and_scale(
    scores: Sequence[float],
    side: Side,
    *,
    min_val: float = -1.5,
    max_val: float = 1.5,
    min_scale: float = 0.7,
    max_scale: float = 1.3,
) -> list[float]:
    """w_t: clamp(s_t, min_val, max_val) on the line min_val -> min_scale, max_val -> max_scale."""
    s = signed_scores(scores, side)
    old, new = (min_val, max_val), (min_scale, max_scale)
    return [rescale(clamp(v, min_val, max_val), old, new) for v in s]


def transform_threshold(
    scores: Sequence[float],
    side: Side,
    *,
    lower_threshold: float = -1.0,
    upper_threshold: float = 1.0,
) -> list[float]:
    """w_t = clamp(s_t, lower_threshold, upper_threshold)."""
    return [clamp(v, lower_threshold, upper_threshold) for v in signed_scores(scores, side)]


def binary_count(n: int, top_percent: float) -> int:
    """k = max(1, floor(n * top_percent / 100)), in exact arithmetic.

    `top_percent` is taken as the decimal number that the user wrote, and k stops at n.
    """
    k = math.floor(n * Fraction(str(top_percent)) / 100)
    return min(n, max(1, k))


def transform_binary(scores: Sequence[float], side: Side, *, top_percent: float = 100) -> list[float]:
    """w_t = 1 if s_t is at least the k-th largest s (so ties at the cut are all in), else 0."""
    s = signed_scores(scores, side)
    if not s:
        return []
    smallest_kept = sorted(s, reverse=True)[binary_count(len(s), top_percent) - 1]
    return [1.0 if v >= smallest_kept else 0.0 for v in s]


def transform_origin(scores: Sequence[float], side: Side) -> list[float]:
    """w_t = s_t."""
    return signed_scores(scores, side)


TRANSFORMS = {
    "exp": transform_exp,
    "rank_based": transform_rank_based,
    "threshold_and_scale": transform_threshold_and_scale,
    "threshold": transform_threshold,
    "binary": transform_binary,
    "origin": transform_origin,
}


def transform(name: str, scores: Sequence[float], side: Side, **params: float) -> list[float]:
    """The weights of one response's scores r_t. Parameters left out have the design's defaults."""
    return TRANSFORMS[name](scores, side, **params)


def eos_weight_of(
    name: str,
    scores: Sequence[float],
    side: Side,
    eos_score: float | None,
    eos_weight: str,
    mean: float,
    **params: float,
) -> float:
    """zero: 0. one: 1. score: transform(scores + [eos_score])[-1] / mean."""
    if eos_weight == "zero":
        return 0.0
    if eos_weight == "one":
        return 1.0
    if eos_weight != "score":
        raise ValueError(f"eos_weight is {eos_weight!r}, not 'zero', 'one' or 'score'")
    if eos_score is None:
        raise ValueError("eos_weight='score' needs an eos_score")
    return transform(name, [*scores, eos_score], side, **params)[-1] / mean


def response_weights(
    name: str,
    scores: Sequence[float | None],
    side: Side,
    *,
    eos_score: float | None = None,
    kept: int,
    has_eos: bool,
    normalize: Literal["none", "mean"] = "none",
    eos_weight: Literal["zero", "one", "score"] = "zero",
    **params: float,
) -> list[float]:
    """The weights of a response as trained on: transform, cut, normalize, then the EOS last.

    `scores` are those of the uncut response without the EOS; None (a token that `estimate`
    did not score) takes no part in the transform and may not be among the `kept` tokens.
    The tokens' weights come from the transform without the EOS whatever `eos_weight` is.
    With no token kept there is no mean, and nothing is divided.
    """
    scored = [r for r in scores if r is not None]
    if any(r is None for r in scores[:kept]) or kept > len(scores):
        raise ValueError("a kept token has no score")
    weights = transform(name, scored, side, **params)[:kept]
    mean = 1.0
    if normalize == "mean" and kept > 0:
        mean = sum(weights) / kept
        if mean <= 0:
            raise ValueError(f"cannot normalize: the mean weight is {mean}")
    elif normalize not in ("none", "mean"):
        raise ValueError(f"normalize is {normalize!r}, not 'none' or 'mean'")
    weights = [w / mean for w in weights]
    if has_eos:
        weights.append(eos_weight_of(name, scored, side, eos_score, eos_weight, mean, **params))
    return weights


# ---------------------------------------------------------------- log-probabilities and scores


def token_logps(model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> torch.Tensor:
    """log pi(y_t | x, y_<t) for each response token: float64 [len(response_ids)], differentiable.

    The logits at position i speak of token i + 1, so response token t, which sits at position
    len(prompt) + t, is read at len(prompt) + t - 1. `prompt_ids` include the BOS if there is one,
    `response_ids` the EOS if there is one. The caller made the model float64, dropout off.
    """
    if len(prompt_ids) == 0:
        raise ValueError("nothing predicts the first response token: the prompt is empty")
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt_ids, *response_ids]], dtype=torch.long, device=device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    log_probs = torch.log_softmax(logits[0].double(), dim=-1)
    places = torch.arange(len(response_ids), device=device) + len(prompt_ids) - 1
    targets = torch.tensor(list(response_ids), dtype=torch.long, device=device)
    return log_probs[places].gather(1, targets[:, None])[:, 0]


def scores(
    forward_model: Any,
    reverse_model: Any,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
) -> torch.Tensor:
    """r_t = log pi+(y_t | x, y_<t) - log pi-(y_t | x, y_<t): float64 [len(response_ids)]."""
    with torch.no_grad():
        plus = token_logps(forward_model, prompt_ids, response_ids)
        minus = token_logps(reverse_model, prompt_ids, response_ids)
    return plus - minus


# ---------------------------------------------------------------- losses and rewards
#
# A pair is a dict of one-dimensional tensors or lists, the EOS included where there is one:
#   policy_chosen_logps    reference_chosen_logps    chosen_weights
#   policy_rejected_logps  reference_rejected_logps  rejected_weights
# dpo_loss and rewards do not read the weights, which may be missing.


def as_float64(values: Any) -> torch.Tensor:
    """A float64 tensor, still in the graph if it was in one."""
    return torch.as_tensor(values, dtype=torch.float64)


def response_sum(logps: Any, ref_logps: Any, weights: Any) -> torch.Tensor:
    """sum_t w_t m_t, with m_t = log pi_theta(y_t | .) - log pi_ref(y_t | .)."""
    logps, ref_logps, weights = as_float64(logps), as_float64(ref_logps), as_float64(weights)
    assert logps.shape == ref_logps.shape == weights.shape, "one weight and reference per token"
    total = torch.zeros((), dtype=torch.float64, device=logps.device)
    for t in range(len(logps)):
        total = total + weights[t] * (logps[t] - ref_logps[t])
    return total


def side_sum(pair: dict[str, Any], side: Side, weighted: bool) -> torch.Tensor:
    """sum_t w_t m_t of one side of a pair, or sum_t m_t if not weighted."""
    logps = pair[f"policy_{side}_logps"]
    weights = pair[f"{side}_weights"] if weighted else [1.0] * len(logps)
    return response_sum(logps, pair[f"reference_{side}_logps"], weights)


def minus_log_sigmoid(z: torch.Tensor) -> torch.Tensor:
    """-log sigma(z) = log(1 + exp(-z)) = log(exp(0) + exp(-z))."""
    return torch.logaddexp(torch.zeros_like(z), -z)


def mean_loss(pairs: Sequence[dict[str, Any]], beta: float, weighted: bool) -> torch.Tensor:
    """The mean over pairs of -log sigma(beta u), u = (sum chosen) - (sum rejected)."""
    losses = []
    for pair in pairs:
        u = side_sum(pair, "chosen", weighted) - side_sum(pair, "rejected", weighted)
        losses.append(minus_log_sigmoid(beta * u))
    return torch.stack(losses).mean()


def dpo_loss(pairs: Sequence[dict[str, Any]], beta: float = 0.1) -> torch.Tensor:
    """DPO: mean over pairs of -log sigma(beta (sum_t m_t (chosen) - sum_t m_t (rejected)))."""
    return mean_loss(pairs, beta, weighted=False)


def tis_dpo_loss(pairs: Sequence[dict[str, Any]], beta: float = 0.1) -> torch.Tensor:
    """TIS-DPO, alpha = 0: -log sigma(beta (sum w_t m_t (chosen) - sum w_t m_t (rejected)))."""
    return mean_loss(pairs, beta, weighted=True)


def rewards(pairs: Sequence[dict[str, Any]], beta: float = 0.1) -> dict[str, list[float]]:
    """beta sum_t m_t, unweighted, a value per pair: chosen, rejected, margins, accuracies.

    The accuracy is 1 if the chosen reward is strictly the larger, else 0.
    """
    result: dict[str, list[float]] = {"chosen": [], "rejected": [], "margins": [], "accuracies": []}
    for pair in pairs:
        chosen = beta * side_sum(pair, "chosen", weighted=False).item()
        rejected = beta * side_sum(pair, "rejected", weighted=False).item()
        result["chosen"].append(chosen)
        result["rejected"].append(rejected)
        result["margins"].append(chosen - rejected)
        result["accuracies"].append(1.0 if chosen > rejected else 0.0)
    return result


# ---------------------------------------------------------------- truncation


def cut_prompt(prompt_ids: list[int], bos: int | None, limit: int, keep: str) -> list[int]:
    """BOS + prompt in at most `limit` tokens, the BOS always in, the prompt's end or start kept."""
    front = [] if bos is None else [bos]
    room = max(0, limit - len(front))
    excess = max(0, len(prompt_ids) - room)
    if keep == "end":
        return front + prompt_ids[excess:]
    if keep == "start":
        return front + prompt_ids[: len(prompt_ids) - excess]
    raise ValueError(f"keep is {keep!r}, not 'end' or 'start'")


def cut_response(response_ids: list[int], eos: int, room: int) -> tuple[list[int], bool, int]:
    """(ids, has the EOS, tokens kept without the EOS) of a response in `room` tokens.

    A response whose tokens fit but whose EOS does not is a cut response.
    """
    whole = [*response_ids, eos]
    if len(whole) <= room:
        return whole, True, len(response_ids)
    kept = response_ids[: max(0, room)]
    return kept, False, len(kept)


def encode_and_cut(
    prompt_ids: Sequence[int],
    chosen_ids: Sequence[int],
    rejected_ids: Sequence[int],
    *,
    bos: int | None,
    eos: int,
    max_length: int,
    max_prompt_length: int,
    keep: Literal["end", "start"] = "end",
) -> dict[str, Any]:
    """Put the BOS in front and the EOS behind, and cut to `max_length` (DESIGN.md section 2).

    1. Only if BOS + prompt + the longer response + EOS exceed max_length, the prompt is cut to
       max_prompt_length, which counts the BOS; the same prompt serves both sides.
    2. Each response, EOS counted, is cut to max_length - len(prompt).
    """
    prompt = ([] if bos is None else [bos]) + list(prompt_ids)
    longer = max(len(chosen_ids), len(rejected_ids)) + 1
    if len(prompt) + longer > max_length:
        prompt = cut_prompt(list(prompt_ids), bos, max_prompt_length, keep)
    room = max_length - len(prompt)
    chosen, chosen_has_eos, chosen_kept = cut_response(list(chosen_ids), eos, room)
    rejected, rejected_has_eos, rejected_kept = cut_response(list(rejected_ids), eos, room)
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_has_eos": chosen_has_eos,
        "rejected_has_eos": rejected_has_eos,
        "chosen_kept": chosen_kept,
        "rejected_kept": rejected_kept,
    }


# ---------------------------------------------------------------- divergences and the other objectives
#
# A pair may hold two lists more for each side, one number per token: policy_side_kl, the divergence
# KL(policy || reference) at the token's position, and reference_side_kl, KL(reference || policy).


def kl_per_position(p_logits: Any, q_logits: Any) -> torch.Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) at each position, from logits [T, V]: float64 [T]."""
    p, q = as_float64(p_logits), as_float64(q_logits)
    result = []
    for t in range(p.shape[0]):
        log_p = p[t] - torch.logsumexp(p[t], dim=0)
        log_q = q[t] - torch.logsumexp(q[t], dim=0)
        result.append((torch.exp(log_p) * (log_p - log_q)).sum())
    return torch.stack(result)


def token_kls(
    policy: Any, reference: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(policy || reference) and KL(reference || policy) where each response token is predicted, float64."""
    ids = torch.tensor([[*prompt_ids, *response_ids]], dtype=torch.long)
    first = len(prompt_ids) - 1
    places = slice(first, first + len(response_ids))
    ours = policy(input_ids=ids, use_cache=False).logits[0, places]
    theirs = reference(input_ids=ids, use_cache=False).logits[0, places].detach()
    return kl_per_position(ours, theirs), kl_per_position(theirs, ours)


def weighted_total(values: Any, weights: Any) -> torch.Tensor:
    """sum_t w_t value_t."""
    values, weights = as_float64(values), as_float64(weights)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(len(values)):
        total = total + weights[t] * values[t]
    return total


def eta(pair: dict[str, Any]) -> torch.Tensor:
    """sum w_t KL(policy || reference)_t of the chosen minus that of the rejected response, with gradient."""
    return weighted_total(pair["policy_chosen_kl"], pair["chosen_weights"]) - weighted_total(
        pair["policy_rejected_kl"], pair["rejected_weights"]
    )


def margin(pair: dict[str, Any]) -> torch.Tensor:
    """u with token weights."""
    return side_sum(pair, "chosen", weighted=True) - side_sum(pair, "rejected", weighted=True)


def dpo_objective(
    pair: dict[str, Any], beta: float, alpha: float = 0.0, label_smoothing: float = 0.0, reference_free: bool = False
) -> torch.Tensor:
    """-(1 - e) log sigma(z) - e log sigma(-z), z = beta (u - alpha eta); reference-free: u of log-probs alone."""
    if reference_free:
        u = weighted_total(pair["policy_chosen_logps"], pair["chosen_weights"]) - weighted_total(
            pair["policy_rejected_logps"], pair["rejected_weights"]
        )
    else:
        u = margin(pair)
    z = beta * (u - alpha * eta(pair)) if alpha else beta * u
    return (1 - label_smoothing) * minus_log_sigmoid(z) + label_smoothing * minus_log_sigmoid(-z)


def ipo_objective(pair: dict[str, Any], beta: float, length_normalize: bool = False) -> torch.Tensor:
    """(u - 1 / (2 beta))^2; normalised, each side's sum is divided by its number of tokens, the EOS included."""
    chosen, rejected = (side_sum(pair, side, weighted=True) for side in ("chosen", "rejected"))
    if length_normalize:
        chosen = chosen / len(pair["policy_chosen_logps"])
        rejected = rejected / len(pair["policy_rejected_logps"])
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def tdpo_objective(pair: dict[str, Any], beta: float, alpha: float | None = None) -> torch.Tensor:
    """TDPO1 without alpha, TDPO2 with it; K sums KL(reference || policy), TDPO2 stops the gradient of K chosen."""
    u = side_sum(pair, "chosen", weighted=False) - side_sum(pair, "rejected", weighted=False)
    chosen, rejected = (as_float64(pair[f"reference_{side}_kl"]).sum() for side in ("chosen", "rejected"))
    penalty = rejected - chosen if alpha is None else alpha * (rejected - chosen.detach())
    return minus_log_sigmoid(beta * (u - penalty))


OBJECTIVES = {
    "dpo": dpo_objective,
    "ipo": ipo_objective,
    "tdpo1": tdpo_objective,
    "tdpo2": lambda pair, beta, alpha=0.5: tdpo_objective(pair, beta, alpha),
}
