"""The method as a library: token scores, token weights and preference losses for your own trainer.

`token_scores` and `token_weights` take torch tensors, numpy arrays or lists, and return the kind they are given;
`preference_loss` takes tensors. Everything is computed by `tisdpo_cli.method`, as in the commands. It knows no files,
no models and no settings. Legend: B pairs, T positions, N response tokens, n tokens of one response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from tisdpo_cli.method.objectives import Loss, PairLosses, pair_losses, resolve_loss
from tisdpo_cli.method.params import Value
from tisdpo_cli.method.recipe import EosWeight, resolve_recipe, response_weights
from tisdpo_cli.method.steps import Context
from tisdpo_cli.method.transforms import RandomStream, Side

FloatArray: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Values = TypeVar("Values", Tensor, FloatArray, list[float])
# One tensor [2B, T], the chosen rows first, or the tensors [B, T] of both sides, whose T may differ.
Padded: TypeAlias = "Tensor | tuple[Tensor, Tensor]"


def token_scores(forward_logps: Values, reverse_logps: Values) -> Values:
    """Scores r of tokens: log π⁺ − log π⁻ under the forward and the reverse contrastive model.

    >>> token_scores([-1.0, -2.0], [-1.5, -1.75])
    [0.5, -0.25]

    Args:
        forward_logps: log-probs of the tokens under the forward model, in nats, of any shape.
        reverse_logps: log-probs of the same tokens under the reverse model.

    Returns:
        Scores in nats, float32, without gradient, of the same kind and shape.

    Raises:
        ValueError: the shapes differ, or a value is not finite.
    """
    forward, like = _tensor("forward_logps", forward_logps)
    reverse, _ = _tensor("reverse_logps", reverse_logps)
    if forward.shape != reverse.shape:
        raise ValueError(
            f"forward_logps has shape {list(forward.shape)} and reverse_logps {list(reverse.shape)}; they must be equal"
        )
    return like(forward - reverse.to(forward.device))


def token_weights(  # noqa: PLR0913 (one keyword per option of the command line)
    scores: Values,
    side: Side,
    transform: str | None = None,
    preset: str | None = None,
    *,
    normalize: Literal["none", "mean"] = "none",
    eos_weight: EosWeight | None = None,
    steps: Mapping[str, Value] | None = None,
    context: Context | None = None,
    seed: int = 0,
    row: int = 0,
    **params: Value,
) -> Values:
    """Token weights of one response from its scores, as `tisdpo train` computes them.

    >>> token_weights([0.0, 2.0, 1.0], "chosen", "rank_based", min_scale=0.5, max_scale=1.5)
    [0.5, 1.5, 1.0]

    Args:
        scores: scores r [n] of the whole response, before any truncation, in nats.
        side: `chosen` or `rejected`.
        transform: a key of `TRANSFORMS`; the preset's, or `exp`, where None.
        preset: a key of `PRESETS`.
        normalize: `mean` divides the weights by their mean.
        eos_weight: how to weigh the last score as that of the EOS: `score` (as one more token, which leaves the other
            weights as they are), `one` or `zero`. None if the scores end without an EOS.
        steps: values of the steps to apply to the scores first, by their keys in `STEPS`.
        context: dataset means or spans of tokens, for the steps `center` and `spans`.
        seed: seed of the transform `random`.
        row: row number of the pair, for the transform `random`.
        params: parameters of the transform.

    Returns:
        Weights [n], float32, without gradient, of the same kind as the scores.

    Raises:
        ValueError: an unknown name, a parameter out of bounds, scores of another shape or not finite, or weights that
            float32 cannot hold.
    """
    values, like = _tensor("scores", scores)
    if values.ndim != 1:
        raise ValueError(f"scores must be those of one response, of shape [n], not {list(values.shape)}")
    _one_of("side", side, ("chosen", "rejected"))
    _one_of("normalize", normalize, ("none", "mean"))
    if eos_weight is not None:
        _one_of("eos_weight", eos_weight, ("score", "one", "zero"))
        if not len(values):
            raise ValueError("scores must end with the score of the EOS if eos_weight is set")
    has_eos = eos_weight is not None
    recipe = resolve_recipe(transform, preset, params, normalize, eos_weight or "score", steps)
    tokens = values[:-1] if has_eos else values
    eos_score = values[-1:] if has_eos else None
    stream = RandomStream(seed, row, side)
    weights = response_weights(tokens, eos_score, len(tokens), has_eos, recipe, stream, context or Context())
    _require_finite("the weights", weights)
    return like(weights)


def preference_loss(
    logps: Padded,
    ref_logps: Padded,
    mask: Padded | None = None,
    *,
    response_ids: Tensor | None = None,
    weights: Padded | None = None,
    kl: Padded | None = None,
    loss: str = "dpo",
    beta: float = 0.1,
    **params: Value,
) -> PairLosses:
    """Loss and rewards of B preference pairs from per-token log-probs; unit weights and `dpo` give DPO.

    Padded tensors are [2B, T] with the chosen rows first, as TRL stacks them, or pairs (chosen [B, T], rejected
    [B, T']). With `response_ids` instead of a mask, all tensors are [N].

    >>> policy, reference = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.full((2, 2), -2.0)
    >>> mask, weights = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[2.0, 1.0], [0.5, 0.0]])
    >>> result = preference_loss(policy, reference, mask, weights=weights, beta=0.4)
    >>> round(result.losses.item(), 4)  # u = 2 · 1 + 1 · 0 − 0.5 · (−1) = 2.5, and log(1 + e^−1) = 0.3133
    0.3133

    Args:
        logps: log-probs of the response tokens under the policy, in nats, with gradient.
        ref_logps: log-probs of the same tokens under the reference model.
        mask: nonzero at response tokens; other positions are never read.
        response_ids: [N] int64, the response of each token: b for the chosen response of pair b, B + b for the
            rejected one.
        weights: token weights; 1 where None.
        kl: KL divergence at each token, with gradient, for objectives that need it.
        loss: a key of `OBJECTIVES`.
        beta: KL penalty coefficient β.
        params: parameters of the objective.

    Returns:
        `losses` [B] with gradient, `rewards` (four tensors [B], detached), and `kl` [2B] or None.

    Raises:
        ValueError: an unknown name, a parameter out of bounds, tensors of different shapes, values that are not finite,
            an empty response, or weights or a missing `kl` that do not fit the objective.
    """
    objective = _objective(loss, beta, params, weights is not None, kl is not None)
    named = {"logps": logps, "ref_logps": ref_logps, "weights": weights, "kl": kl}
    given = {name: value for name, value in named.items() if value is not None}
    if mask is not None and response_ids is None:
        flat, ids, pairs = _padded(given, mask)
    elif response_ids is not None and mask is None:
        flat, ids, pairs = _flat(given, response_ids)
    else:
        raise ValueError("give either mask or response_ids")
    _require_tokens(ids, pairs)
    values = {name: value.to(ids.device, torch.float32) for name, value in flat.items()}
    for name, value in values.items():
        _require_finite(name, value)
    scale = values["weights"].detach() if "weights" in values else torch.ones_like(values["ref_logps"])
    return pair_losses(values["logps"], values["ref_logps"], values.get("kl"), scale, ids, pairs, objective)


def _objective(name: str, beta: float, params: Mapping[str, Value], has_weights: bool, has_kl: bool) -> Loss:
    """The objective with its parameters, checked against what is passed with it."""
    objective = resolve_loss(name, beta, params)
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be above 0, not {beta}")
    if has_weights and not objective.objective.takes_weights:
        raise ValueError(f"loss {name} takes no token weights")
    if not has_kl and objective.needs.divergence is not None:
        raise ValueError(f"loss {name} needs kl, the divergence {objective.needs.divergence} at each token")
    return objective


def _tensor(name: str, values: Values) -> tuple[Tensor, Callable[[Tensor], Values]]:
    """Values as a new float32 tensor without gradient, and what turns a result into their kind.

    Raises:
        ValueError: a value is no finite number.
    """
    try:
        if isinstance(values, Tensor):
            tensor = values.detach().to(torch.float32, copy=True)
        else:
            tensor = torch.from_numpy(np.array(values, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold numbers only: {error}") from error
    _require_finite(name, tensor)
    if isinstance(values, Tensor):
        return tensor, lambda result: result
    if isinstance(values, np.ndarray):
        return tensor, lambda result: result.numpy()
    return tensor, lambda result: result.tolist()


def _require_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        position = (~values.detach().isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, not {values[tuple(position)].item()} (at {position})")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, not {value!r}")


def _padded(given: Mapping[str, Padded], mask: Padded) -> tuple[dict[str, Tensor], Tensor, int]:
    """Values [N] at the response tokens, the response of each, and B."""
    masks = tuple(side.bool() for side in _sides("mask", mask))
    pairs = len(masks[0])
    if len(masks[1]) != pairs:
        raise ValueError(f"mask has {pairs} chosen and {len(masks[1])} rejected rows")
    flat = {}
    for name, value in given.items():
        sides = _sides(name, value)
        for side, seen in zip(sides, masks, strict=True):
            if side.shape != seen.shape:
                raise ValueError(f"{name} has shape {list(side.shape)} on one side and mask {list(seen.shape)}")
        flat[name] = torch.cat([side[seen.to(side.device)] for side, seen in zip(sides, masks, strict=True)])
    rows = [seen.nonzero()[:, 0] + offset for seen, offset in zip(masks, (0, pairs), strict=True)]
    return flat, torch.cat(rows).to(flat["logps"].device), pairs


def _sides(name: str, value: Padded) -> tuple[Tensor, Tensor]:
    """The chosen and the rejected rows of a padded tensor, [B, T] each."""
    if isinstance(value, Tensor):
        if value.ndim != 2 or len(value) % 2:
            raise ValueError(f"{name} must have shape [2B, T], the chosen rows first, not {list(value.shape)}")
        return value[: len(value) // 2], value[len(value) // 2 :]
    chosen, rejected = value
    if chosen.ndim != 2 or rejected.ndim != 2:
        raise ValueError(f"{name} must hold two tensors of shape [B, T], not {list(chosen.shape)}")
    return chosen, rejected


def _flat(given: Mapping[str, Padded], response_ids: Tensor) -> tuple[dict[str, Tensor], Tensor, int]:
    """The values [N] as they are, the response of each, and B."""
    flat = {}
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.ndim != 1 or value.shape != response_ids.shape:
            raise ValueError(f"{name} must be a tensor [N] as long as response_ids")
        flat[name] = value
    ids = response_ids.to(flat["logps"].device, torch.int64)
    if not len(ids) or ids.min() < 0 or ids.max() % 2 == 0:
        raise ValueError("response_ids must go from 0 to 2B − 1: the chosen responses, then the rejected ones")
    return flat, ids, (int(ids.max()) + 1) // 2


def _require_tokens(ids: Tensor, pairs: int) -> None:
    counts = ids.bincount(minlength=2 * pairs)
    if not counts.all():
        empty = int((counts == 0).nonzero()[0])
        side = "chosen" if empty < pairs else "rejected"
        raise ValueError(f"the {side} response of pair {empty % pairs} has no tokens")
