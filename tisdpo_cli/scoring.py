"""Per-token log-probs of responses under a causal language model: the one forward pass of every stage.

Knows the shape of a batch and how to read a model's head at the scored positions only; it knows nothing of
pairs, losses, files or devices. Legend: R rows, T positions, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Rows of prompt + response, padded on the right, and the response tokens to score.

    Attributes:
        input_ids: [R, T] int64.
        positions: [N] int64 into the flattened [R · T] rows: the position that predicts each scored token.
        targets: [N] int64, the scored tokens.
        owner: [N] int64, the row of each.
        real_tokens: tokens that are not padding, for throughput.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    owner: Tensor
    real_tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.owner.to(device, non_blocking=True),
            self.real_tokens,
        )


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> Batch:
    """Make a batch of (prompt ids, response ids) rows; padding is known by length, never by id.

    Raises:
        ValueError: a prompt without a token: its response's first token would have nothing to be predicted from.
    """
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    positions, targets, owner = [], [], []
    for r, (prompt, response) in enumerate(rows):
        if not prompt:
            raise ValueError("a response can be scored only after at least one prompt token")
        length = len(prompt) + len(response)
        input_ids[r, :length] = torch.tensor([*prompt, *response])
        first = r * width + len(prompt) - 1
        positions.append(torch.arange(first, first + len(response)))
        targets.append(torch.tensor(response, dtype=torch.int64))
        owner.append(torch.full((len(response),), r))
    real = sum(len(prompt) + len(response) for prompt, response in rows)
    return Batch(input_ids, torch.cat(positions), torch.cat(targets), torch.cat(owner), real)


class TokenScorer(nn.Module):
    """A causal language model that returns per-token log-probs; this is what DDP wraps.

    The model's own forward runs unchanged, but its head sees only the N positions that predict a scored token:
    a hook narrows the hidden states on their way in. Bias, scaling and soft-capping of the family's head so
    stay the model's business.

    No attention mask is passed: rows are padded on the right, where causal attention never looks.

    Args:
        model: a transformers causal LM.
        autocast: the dtype to compute in (torch.bfloat16), or None for the weights' own.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast

    def forward(self, input_ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Log-probs [N] float32 of `targets`; shapes as in `Batch`."""
        with self._autocast(input_ids.device):
            logits = self._logits(input_ids, positions)
        return -F.cross_entropy(logits.float(), targets, reduction="none")

    def _logits(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [N, V] at the scored positions."""
        narrowed = False

        def narrow(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal narrowed
            narrowed = True
            # index_select, not indexing: the backward of indexing is not deterministic on several threads.
            return (inputs[0].flatten(0, 1).index_select(0, positions).unsqueeze(0), *inputs[1:])

        head = self.model.get_output_embeddings()  # type: ignore[operator]
        handle = head.register_forward_pre_hook(narrow) if head is not None else None
        try:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
        finally:
            if handle is not None:
                handle.remove()
        if narrowed:
            return logits.squeeze(0)
        return logits.flatten(0, 1).index_select(0, positions)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def score(scorer: nn.Module, batch: Batch) -> Tensor:
    """Log-probs [N] of a batch; `scorer` is a `TokenScorer` or what wraps it."""
    return scorer(batch.input_ids, batch.positions, batch.targets)
