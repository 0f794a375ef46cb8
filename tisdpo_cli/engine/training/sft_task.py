"""The forward pass of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tisdpo_cli.engine.training.batching import PaddedCosts
from tisdpo_cli.engine.training.dry_run import ExampleSize
from tisdpo_cli.model.batch import Batch
from tisdpo_cli.model.logprobs import collated_for, device_of, score


@dataclass(frozen=True)
class EncodedExample:
    """A tokenized example: tokens given as context, tokens to learn, and whether these end the response.

    Attributes:
        opening: number of tokens at the end of the context that a chat template writes before every answer.
        left_out: number of tokens to learn that were truncated.
    """

    where: str
    given: list[int]
    learned: list[int]
    has_end: bool = True
    opening: int = 0
    left_out: int = 0


class SftTask:
    """Supervised fine-tuning: mean cross-entropy per learned token."""

    unit = "examples"
    metrics: tuple[str, ...] = ("loss", "token_probability")

    def __init__(self, examples: Sequence[EncodedExample], pad: int) -> None:
        self.examples, self.pad = examples, pad
        self.costs: list[int] = [len(e.given) + len(e.learned) for e in examples]
        self.padded_costs = PaddedCosts(self.costs)

    def pass_costs(self, layout: str) -> Sequence[int]:
        """Tokens of each example before the model is loaded, when `auto` is taken to pack."""
        return self.padded_costs if layout == "separate" else self.costs

    def size(self, example: int) -> ExampleSize:
        """The sizes of an example."""
        return ExampleSize(len(self.examples[example].given), (len(self.examples[example].learned),))

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.costs)

    def end(self, default: int) -> int:
        """The id that ends responses, or another if all are truncated."""
        return next((example.learned[-1] for example in self.examples if example.has_end), default)

    def where(self, example: int) -> str:
        """FILE:LINE of an example."""
        return self.examples[example].where

    def prompt(self, example: int) -> Sequence[int]:
        """Token ids of the prompt of an example, as far as it is not learned."""
        return self.examples[example].given

    def normaliser(self, examples: Sequence[int]) -> float:
        """The number of learned tokens."""
        return float(sum(len(self.examples[i].learned) for i in examples))

    def prepare(self, scorer: nn.Module, examples: Sequence[int]) -> Batch:
        """Some examples as a batch, in the memory of the CPU."""
        groups = [(self.examples[i].given, [self.examples[i].learned]) for i in examples]
        return collated_for(scorer, groups, self.pad)

    def forward(self, scorer: nn.Module, prepared: Batch) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy, with gradient, and the sums of the metrics."""
        logps = score(scorer, prepared.to(device_of(scorer)))
        loss = -logps.sum()
        return loss, torch.stack([loss.detach().double(), logps.detach().double().exp().sum()])
