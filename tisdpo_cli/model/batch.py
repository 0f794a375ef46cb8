"""Batches of prompts and responses for a model: packed into one row, or one row per response.

Knows token ids and shapes. Knows no model, no pairs and no files. Legend: R rows, T positions, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tisdpo_cli.model.packed_attention import PackedLayout, packed_positions

# Token ids of a prompt and of its responses.
Group = tuple[Sequence[int], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Batch:
    """Model inputs, and the response tokens to score.

    Scored tokens are concatenated response after response: all first responses in the order of their prompts, then all
    second ones. `response_ids` numbers the responses in that order.

    Attributes:
        input_ids: [R, T] int64, padded on the right; [1, T] if packed.
        positions: [N] int64 into the flattened [R · T] rows: the position that predicts each scored token.
        targets: [N] int64, scored token ids.
        response_ids: [N] int64, the response of each scored token.
        real_tokens: number of tokens without padding, for throughput.
        position_ids: [1, T] int64 if packed.
        layout: positions of prompts and responses in the row, if packed.
        groups: what was collated.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    response_ids: Tensor
    real_tokens: int
    position_ids: Tensor | None = None
    layout: PackedLayout | None = None
    groups: Sequence[Group] = ()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return the batch in memory that a GPU can copy from by itself."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


def collate(groups: Sequence[Group], pad_id: int, packed: bool) -> Batch:
    """Collate prompts with the same number of responses each into a batch.

    Args:
        groups: (prompt ids, ids of its responses).
        pad_id: padding token; scoring tells padding by length, never by id.
        packed: put everything into one row without padding, each prompt once; otherwise one row per response, after
            its prompt.

    Raises:
        ValueError: a prompt is empty, so nothing predicts the first token of its responses.
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
    return Batch(input_ids, torch.cat(positions), *_targets(groups), real, groups=groups)


def _packed(groups: Sequence[Group]) -> Batch:
    lengths = tuple((len(prompt), tuple(map(len, responses))) for prompt, responses in groups)
    ids = [token for prompt, responses in groups for part in (prompt, *responses) for token in part]
    # The positions that predict the tokens of the first response of each prompt, of the second one, and so on.
    predicting: list[list[Tensor]] = [[] for _ in lengths[0][1]]
    begin = 0
    for prompt, responses in lengths:
        last_of_prompt, begin = begin + prompt - 1, begin + prompt
        for column, length in zip(predicting, responses, strict=True):
            positions = torch.arange(begin - 1, begin + length - 1)
            positions[:1] = last_of_prompt
            column.append(positions)
            begin += length
    return Batch(
        torch.tensor([ids]),
        torch.cat([positions for column in predicting for positions in column]),
        *_targets(groups),
        len(ids),
        packed_positions(lengths)[None],
        PackedLayout(lengths),
        groups,
    )


def _columns(groups: Sequence[Group]) -> list[list[tuple[Sequence[int], Sequence[int]]]]:
    """(prompt, response) of all first responses, of all second ones, and so on."""
    return [[(prompt, responses[k]) for prompt, responses in groups] for k in range(len(groups[0][1]))]


def _targets(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    responses = [response for column in _columns(groups) for _, response in column]
    targets = torch.tensor([token for response in responses for token in response], dtype=torch.int64)
    lengths = torch.tensor([len(response) for response in responses])
    return targets, torch.arange(len(responses)).repeat_interleave(lengths)
