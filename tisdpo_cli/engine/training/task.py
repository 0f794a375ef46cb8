"""What a trainer needs of what it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Task(Protocol):
    """What is trained: examples, and the loss and metrics of some of them."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, `loss` first."""

    @property
    def unit(self) -> str:
        """What an example is called, in the plural: `pairs` or `examples`."""

    @property
    def costs(self) -> Sequence[int]:
        """Tokens of each example in packed rows."""

    @property
    def padded_costs(self) -> Sequence[int]:
        """Tokens of each example in separate rows."""

    def prompt(self, example: int) -> Sequence[int]:
        """Token ids of the prompt of an example."""

    def normaliser(self, examples: Sequence[int]) -> float:
        """The divisor that turns sums over these examples into the loss and the metrics."""

    def prepare(self, scorer: nn.Module, examples: Sequence[int]) -> Any:
        """What a forward pass over some examples needs, in the memory of the CPU."""

    def forward(self, scorer: nn.Module, prepared: Any) -> tuple[Tensor, Tensor]:
        """The summed loss, with gradient, and the sums of all metrics [M] in float64, without."""

    def where(self, example: int) -> str:
        """FILE:LINE of an example."""
