"""Batches: prompts and responses as a model reads them, packed into one row or one row per response.

Knows token ids and shapes; it knows no model, no pairs and no files. Legend: R rows, T positions, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tisdpo_cli.model.packed_attention import PackedLayout, packed_positions


@dataclass(frozen=True)
class Batch:
    """Prompts and responses as the model reads them, and the response tokens to score.

    The scored tokens come response after response: all first responses in the order of their prompts, then all second
    ones; `response_ids` numbers the responses in that order.

    Attributes:
        input_ids: [R, T] int64, padded on the right; [1, T] where packed.
        positions: [N] int64 into the flattened [R · T] rows: the position that predicts each scored token.
        targets: [N] int64, the scored tokens.
        owner: [N] int64, the response of each.
        real_tokens: tokens that are not padding, for throughput.
        position_ids: [1, T] int64 where packed.
        groups: what stands where in a packed row.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    response_ids: Tensor
    real_tokens: int
    position_ids: Tensor | None = None
    groups: PackedLayout | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved)


# A prompt and its responses.
Group = tuple[Sequence[int], Sequence[Sequence[int]]]


def collate(groups: Sequence[Group], pad_id: int, packed: bool) -> Batch:
    """Make a batch of prompts with equally many responses each.

    Args:
        groups: (prompt ids, ids of its responses).
        pad_id: fills rows of their own; padding is known by length, never by id.
        packed: whether all stand in one row without padding, each prompt once; else every response has a row of its
            own, behind its prompt.

    Raises:
        ValueError: a prompt without a token: its response's first token would have nothing to be predicted from.
    """
    if not all(prompt for prompt, _ in groups):
        raise ValueError("a response can be scored only after at least one prompt token")
    return _packed(groups) if packed else _rows(groups, pad_id)


def _rows(groups: Sequence[Group], pad_id: int) -> Batch:
    rows = [(prompt, response) for column in _columns(groups) for prompt, response in column]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    positions = []
    for r, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        input_ids[r, :length] = torch.tensor([*prompt, *response])
        first = r * width + len(prompt) - 1
        positions.append(torch.arange(first, first + len(response)))
    real = sum(len(prompt) + len(response) for prompt, response in rows)
    return Batch(input_ids, torch.cat(positions), *_targets(groups), real)


def _packed(groups: Sequence[Group]) -> Batch:
    lengths = tuple((len(prompt), tuple(map(len, responses))) for prompt, responses in groups)
    ids = [at for prompt, responses in groups for part in (prompt, *responses) for at in part]
    # By place among the responses of its prompt: the positions that predict a response's tokens.
    predicting: list[list[Tensor]] = [[] for _ in lengths[0][1]]
    begin = 0
    for prompt, responses in lengths:
        last, begin = begin + prompt - 1, begin + prompt
        for column, length in zip(predicting, responses, strict=True):
            before = torch.arange(begin - 1, begin + length - 1)
            before[:1] = last
            column.append(before)
            begin += length
    return Batch(
        torch.tensor([ids]),
        torch.cat([positions for column in predicting for positions in column]),
        *_targets(groups),
        len(ids),
        packed_positions(lengths)[None],
        PackedLayout(lengths),
    )


def _columns(groups: Sequence[Group]) -> list[list[tuple[Sequence[int], Sequence[int]]]]:
    """(prompt, response) of all first responses, of all second ones, and so on."""
    return [[(prompt, responses[k]) for prompt, responses in groups] for k in range(len(groups[0][1]))]


def _targets(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    responses = [response for column in _columns(groups) for _, response in column]
    targets = torch.tensor([at for response in responses for at in response], dtype=torch.int64)
    lengths = torch.tensor([len(response) for response in responses])
    return targets, torch.arange(len(responses)).repeat_interleave(lengths)
