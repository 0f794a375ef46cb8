"""A preference objective over pairs: the forward pass of train-dpo, train-reverse and train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tisdpo_cli.engine.training.batching import pair_costs
from tisdpo_cli.engine.training.weighted_pairs import WeightedPair, are_weighted, tokens_of
from tisdpo_cli.method.objectives import Loss, pair_losses, response_sums
from tisdpo_cli.model.batch import Batch
from tisdpo_cli.model.logprobs import ComparedLogps, TokenScorer, collated_for, compare, device_of, score

_REWARDS = ("chosen", "rejected", "margins", "accuracies")
_PLAIN = ("loss", *(f"rewards/{name}" for name in _REWARDS), "logps/chosen", "logps/rejected")
_WEIGHTED = tuple(f"weighted_rewards/{name}" for name in _REWARDS)
_KL = ("kl/chosen", "kl/rejected", "kl/margins")
# Log-ratio margins of a pair in nats up to which it is a tie: float32 sums over two packings of a model of 135 M
# parameters differ by up to 1.1e-4.
_TIE = 5e-4


@dataclass(frozen=True)
class PairBatch:
    """The pairs of a forward pass.

    Attributes:
        batch: their tokens.
        pairs: their number.
        weights: of the scored tokens [N], or None for unit weights.
        reference: log-probs of the scored tokens [N] under the reference, or None if a model computes them.
    """

    batch: Batch
    pairs: int
    weights: Tensor | None
    reference: Tensor | None


class PairTask:
    """A preference objective over pairs.

    Attributes:
        metrics: names of the sums that `forward` returns, in order.
    """

    unit = "pairs"

    def __init__(
        self,
        pairs: Sequence[WeightedPair],
        reference: TokenScorer | Mapping[tuple[int, ...], Tensor] | None,
        loss: Loss,
        pad: int,
    ) -> None:
        """Create a task.

        Args:
            pairs: to train or evaluate.
            reference: the model, or its log-probs for each forward pass; None if the pairs hold its log-probs.
            loss: the objective.
            pad: the padding id.
        """
        self.pairs, self.reference, self.loss, self.pad = pairs, reference, loss, pad
        self.weighted = are_weighted(pairs)
        computes_kl = loss.needs.divergence is not None
        self.metrics: tuple[str, ...] = _PLAIN + (_WEIGHTED if self.weighted else ()) + (_KL if computes_kl else ())
        encoded = tokens_of(pairs)
        self.costs, self.padded_costs = (pair_costs(encoded, packed) for packed in (True, False))

    def where(self, example: int) -> str:
        """FILE:LINE of a pair."""
        return self.pairs[example].tokens.where

    def prompt(self, example: int) -> Sequence[int]:
        """Token ids of the prompt of a pair."""
        return self.pairs[example].tokens.prompt

    def normaliser(self, examples: Sequence[int]) -> float:
        """The number of pairs: every pair counts once."""
        return float(len(examples))

    def prepare(self, scorer: nn.Module, examples: Sequence[int]) -> PairBatch:
        """Some pairs as a batch, with both responses of all, in the memory of the CPU."""
        pairs = [self.pairs[i] for i in examples]
        groups = [(p.tokens.prompt, (p.tokens.chosen.ids, p.tokens.rejected.ids)) for p in pairs]
        reference = None
        if self.reference is None:
            reference = _in_order([pair.reference for pair in pairs])
        elif not isinstance(self.reference, TokenScorer):
            reference = self.reference[tuple(examples)]
        weights = _in_order([pair.weights for pair in pairs]) if self.weighted else None
        return PairBatch(collated_for(scorer, groups, self.pad), len(pairs), weights, reference)

    def forward(self, scorer: nn.Module, prepared: PairBatch) -> tuple[Tensor, Tensor]:
        """The summed loss and metrics of the pairs of a batch."""
        batch, count = prepared.batch.to(device_of(scorer)), prepared.pairs
        compared = self._compared(scorer, batch, prepared.reference)
        weights = torch.ones_like(compared.logps)
        if prepared.weights is not None:
            weights = prepared.weights.to(weights.device, non_blocking=True)
        result = pair_losses(*compared, weights, batch.response_ids, count, self.loss)
        logps = response_sums(compared.logps.detach(), batch.response_ids, 2 * count)
        r = result.rewards
        tie = self.loss.beta * _TIE
        columns = [result.losses.detach(), *_rewards(r.chosen, r.rejected, tie), *_halves(logps)]
        if self.weighted:
            columns += _rewards(r.weighted_chosen, r.weighted_rejected, tie)
        if result.kl is not None:
            chosen, rejected = _halves(result.kl)
            columns += [chosen, rejected, chosen - rejected]
        return result.losses.sum(), torch.stack([column.double().sum() for column in columns])

    def _compared(self, scorer: nn.Module, batch: Batch, reference: Tensor | None) -> ComparedLogps:
        if reference is None:
            assert isinstance(self.reference, TokenScorer)
            return compare(scorer, self.reference, batch, self.loss.needs.divergence)
        logps = score(scorer, batch)
        return ComparedLogps(logps, reference.to(logps.device, non_blocking=True), None)


def _in_order(both: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor:
    """Values of all chosen responses, then of all rejected ones: the token order of a batch."""
    return torch.cat([pair[side] for side in (0, 1) for pair in both if pair is not None])


def _halves(of_both: Tensor) -> tuple[Tensor, Tensor]:
    """Split values [2B] into chosen and rejected."""
    return of_both[: len(of_both) // 2], of_both[len(of_both) // 2 :]


def _rewards(chosen: Tensor, rejected: Tensor, tie: float) -> list[Tensor]:
    margins = chosen - rejected
    return [chosen, rejected, margins, (margins > tie).to(chosen.dtype)]
