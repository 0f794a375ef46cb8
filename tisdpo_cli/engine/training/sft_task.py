"""The forward pass of supervised fine-tuning."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.data.stored_examples import EncodedExample, example_lengths, example_numbers
from tisdpo_cli.data.tokens import percentiles
from tisdpo_cli.engine.training.batching import PaddedCosts
from tisdpo_cli.engine.training.dry_run import ExampleSize
from tisdpo_cli.model.batch import Batch
from tisdpo_cli.model.logprobs import collated_for, device_of, score


class SftTask:
    """Supervised fine-tuning: mean cross-entropy per learned token."""

    unit = "examples"
    metrics: tuple[str, ...] = ("loss", "token_probability")

    def __init__(self, examples: Sequence[EncodedExample], pad: int) -> None:
        self.examples, self.pad = examples, pad
        self._lengths = example_lengths(examples)
        self.costs = array("q", self._lengths.sum(axis=1))
        self.padded_costs = PaddedCosts(self.costs)

    def pass_costs(self, layout: str) -> Sequence[int]:
        """Tokens of each example before the model is loaded, when `auto` is taken to pack."""
        return self.padded_costs if layout == "separate" else self.costs

    def size(self, example: int) -> ExampleSize:
        """The sizes of an example."""
        given, learned = self._lengths[example].tolist()
        return ExampleSize(given, (learned,))

    def sizes(self) -> dict[str, Any]:
        """Counts and lengths as plain values; prompts are those after truncation."""
        left_out, has_end = (example_numbers(self.examples, name) for name in ("left_out", "has_end"))
        whole = self._lengths[:, 1] + left_out - has_end
        return {
            "examples": len(self.examples),
            "prompt_tokens": percentiles(self._lengths[:, 0].tolist()),
            "response_tokens": percentiles(whole.tolist()),
            "truncated_responses": int((has_end == 0).sum()),
        }

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
        return float(self._lengths[list(examples), 1].sum())

    def prepare(self, scorer: nn.Module, examples: Sequence[int]) -> Batch:
        """Some examples as a batch, in the memory of the CPU."""
        groups = [(example.given, [example.learned]) for example in map(self.examples.__getitem__, examples)]
        return collated_for(scorer, groups, self.pad)

    def forward(self, scorer: nn.Module, prepared: Batch) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy, with gradient, and the sums of the metrics."""
        logps = score(scorer, prepared.to(device_of(scorer)))
        loss = -logps.sum()
        return loss, torch.stack([loss.detach().double(), logps.detach().double().exp().sum()])
