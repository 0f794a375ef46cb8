"""Keeps rows apart in models whose positions depend on the longest row of a forward pass.

Pure torch. Rope scalings `longrope` and `dynamic` choose the frequencies of all rows by the longest one, and `dynamic`
keeps those of the longest row so far. Rows that share a pass here have the frequencies that each has alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.model.batch import Batch, Group, collate


@dataclass(frozen=True)
class LengthRule:
    """Which rows may share a forward pass.

    Attributes:
        limits: (tokens, exact): rows of at most this many tokens may share one; of longer ones all, or if `exact` only
            those of the same length.
    """

    limits: tuple[tuple[int, bool], ...] = ()

    def side(self, length: int) -> tuple[int, ...]:
        """The same for rows that may share a pass."""
        return tuple(0 if length <= limit else length if exact else 1 for limit, exact in self.limits)

    def parts(self, batch: Batch) -> list[tuple[Batch, Tensor]]:
        """Split a batch into batches that are each computed alone.

        Returns:
            Each part with the place [n] of its scored tokens among those of the batch; empty if the batch needs no
            split.
        """
        buckets: dict[tuple[Any, ...], list[tuple[int, int | None]]] = {}
        for number, (prompt, responses) in enumerate(batch.groups):
            sides = [self.side(len(prompt) + len(response)) for response in responses]
            # Only packed rows gain from keeping the responses of a prompt together.
            if batch.layout is not None and len(set(sides)) == 1:
                buckets.setdefault((sides[0], "whole"), []).append((number, None))
            else:
                for k, side in enumerate(sides):
                    buckets.setdefault((side, "single"), []).append((number, k))
        return [] if len(buckets) <= 1 else [_part(batch, items) for items in buckets.values()]


# For a model whose rows depend on each other in an unknown way: only rows of equal length share a pass.
EQUAL_LENGTHS = LengthRule(((0, True),))


def _part(batch: Batch, items: list[tuple[int, int | None]]) -> tuple[Batch, Tensor]:
    groups: list[Group] = []
    for number, k in items:
        prompt, responses = batch.groups[number]
        groups.append((prompt, responses if k is None else [responses[k]]))
    count = len(batch.groups)
    # In the order of scored tokens in a batch: first responses, then second ones.
    responses_in_order = [
        (number + count * (column if k is None else k)) for column in range(len(groups[0][1])) for number, k in items
    ]
    lengths = [len(responses[k]) for k in range(len(batch.groups[0][1])) for _, responses in batch.groups]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    places = [torch.arange(ends[r] - lengths[r], ends[r]) for r in responses_in_order]
    part = collate(groups, 0, packed=batch.layout is not None).to(batch.input_ids.device)
    return part, torch.cat(places).to(batch.input_ids.device)


def length_rule(model: nn.Module) -> LengthRule:
    """The rule of a model, from the rope modules in it."""
    limits = []
    for module, name, kind in _ropes(model):
        config: Any = getattr(module, "config", None)
        if "dynamic" in kind:
            limits.append((int(module.original_max_seq_len), True))  # type: ignore[arg-type]
        elif kind == "longrope":
            limits.append((_original_positions(config, name), False))
    return LengthRule(tuple(sorted(set(limits))))


def forget_lengths(model: nn.Module) -> None:
    """Restore the frequencies that `dynamic` rope modules start with, whatever rows they saw before."""
    for module, name, kind in _ropes(model):
        prefix = f"{name}_" if name else ""
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if "dynamic" in kind and original is not None:
            current = getattr(module, f"{prefix}inv_freq")
            setattr(module, f"{prefix}inv_freq", original.to(current.device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _ropes(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Modules with a rope, the layer type that it is for or an empty string, and its kind."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if not hasattr(module, "original_max_seq_len"):
            continue
        if isinstance(kinds, str):
            yield module, "", kinds
        elif isinstance(kinds, Mapping):
            yield from ((module, str(name), str(kind)) for name, kind in kinds.items())


def _original_positions(config: Any, name: str) -> int:
    ropes = config.rope_parameters
    ropes = ropes[name] if name else ropes
    limit = ropes.get("original_max_position_embeddings")
    return int(limit if limit is not None else config.original_max_position_embeddings)
