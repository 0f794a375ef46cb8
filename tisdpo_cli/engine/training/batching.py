"""Which examples form which update, and how they are split into forward passes. The same on every rank."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tisdpo_cli.data.arrow_files import IntArray
from tisdpo_cli.data.stored_tokens import pair_lengths
from tisdpo_cli.data.tokens import EncodedPair
from tisdpo_cli.errors import UsageError


@dataclass(frozen=True)
class Plan:
    """The updates of a training.

    Attributes:
        examples: number of examples.
        batch_size: examples per update, over all processes; the last update of an epoch may have fewer.
        updates: number of updates.
        seed: of the order.
    """

    examples: int
    batch_size: int
    updates: int
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        """Updates in one pass over the data."""
        return math.ceil(self.examples / self.batch_size)

    def trained(self) -> IntArray:
        """The examples that any update trains, in the order of the dataset."""
        if self.updates >= self.batches_per_epoch:
            return np.arange(self.examples)
        return np.sort(np.array([i for step in range(self.updates) for i in self.batch(step)], np.int64))

    def batch(self, step: int) -> list[int]:
        """The examples of an update (0 is the first), in the seeded order."""
        epoch, position = divmod(step, self.batches_per_epoch)
        order = _order(self.examples, self.seed, epoch)
        return order[position * self.batch_size : (position + 1) * self.batch_size].tolist()


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(examples, generator=generator)


def make_plan(examples: int, batch_size: int, epochs: float, max_steps: int | None, seed: int) -> Plan:
    """Number the updates; `max_steps` overrides `epochs` and repeats the data if needed."""
    per_epoch = math.ceil(examples / batch_size)
    updates = max_steps if max_steps is not None else max(1, math.ceil(per_epoch * epochs - 1e-9))
    return Plan(examples, batch_size, updates, seed)


class PaddedCosts(array):
    """Tokens of each example in rows that are padded to the longest one of their pass: a pass costs its number of
    examples times the largest of them, where packed examples cost their sum.
    """

    def __new__(cls, costs: Iterable[int]) -> PaddedCosts:
        """An array of these numbers."""
        return super().__new__(cls, "q", costs)  # type: ignore[return-value]


def pair_costs(pairs: Sequence[EncodedPair], packed: bool) -> Sequence[int]:
    """Tokens of each pair in a forward pass: packed, or both responses in rows as long as the longer one."""
    lengths = pair_lengths(pairs)
    if packed:
        return array("q", lengths.sum(axis=1))
    return PaddedCosts(2 * longest_rows(pairs))


def longest_rows(pairs: Sequence[EncodedPair]) -> IntArray:
    """Tokens of the prompt and the longer response of each pair, [n]."""
    lengths = pair_lengths(pairs)
    return lengths[:, 0] + lengths[:, 1:].max(axis=1, initial=0)


@dataclass(frozen=True)
class Microbatching:
    """How a batch is split into forward passes: by tokens, by examples, or into a number of passes.

    Attributes:
        tokens: maximum tokens of a pass on each process; a single example may have more.
        micro: maximum examples of a pass on each process.
        passes: number of passes.
    """

    tokens: int | None = None
    micro: int | None = None
    passes: int | None = None

    def split(self, batch: Sequence[int], costs: Sequence[int], world: int) -> list[list[list[int]]]:
        """Split a batch into forward passes: [rank][pass] → examples.

        Every rank gets the same number of passes of similar size; with too few examples some are empty.

        Args:
            batch: examples.
            costs: tokens of each example; `PaddedCosts` in separate rows.
            world: number of ranks.
        """
        ordered = sorted(batch, key=lambda i: -costs[i])
        if self.tokens is not None:
            within = _padded_within if isinstance(costs, PaddedCosts) else _within
            groups = within(ordered, costs, self.tokens, world)
        else:
            passes = self.passes or math.ceil(len(batch) / ((self.micro or len(batch)) * world))
            groups = _even_parts(ordered, passes * world)
        return [groups[rank::world] for rank in range(world)]

    def passes_of(self, batch: Sequence[int], costs: Sequence[int], world: int, rank: int) -> list[list[int]]:
        """The forward passes of one rank; some may be empty."""
        return self.split(batch, costs, world)[rank]


def planned_passes(
    plan: Plan, microbatching: Microbatching, costs: Sequence[int], world: int, rank: int
) -> list[list[int]]:
    """Every forward pass of one rank in a training, in order. An empty pass runs on the first example of its batch."""
    batches = map(plan.batch, range(plan.updates))
    return [
        examples or batch[:1] for batch in batches for examples in microbatching.passes_of(batch, costs, world, rank)
    ]


def _within(ordered: Sequence[int], costs: Sequence[int], tokens: int, world: int) -> list[list[int]]:
    """The fewest groups, a multiple of `world`, of at most this many tokens each, or one example."""
    passes = math.ceil(sum(costs[i] for i in ordered) / (tokens * world))
    while True:
        groups = _balanced(ordered, costs, passes * world)
        if all(len(group) <= 1 or sum(costs[i] for i in group) <= tokens for group in groups):
            return groups
        passes += 1


def _padded_within(ordered: Sequence[int], costs: Sequence[int], tokens: int, world: int) -> list[list[int]]:
    """Like `_within`, for examples from the longest on that are padded to the first of their group."""
    parts = math.ceil(len(_cut(ordered, costs, tokens)) / world) * world
    alone = [[i] for i in ordered if costs[i] > tokens]
    others = ordered[len(alone) :]
    # The smallest limit that needs no more groups: it makes them similar.
    low, high = (costs[others[0]], tokens) if others else (0, 0)
    while low < high:
        middle = (low + high) // 2
        fits = len(alone) + len(_cut(others, costs, middle)) <= parts
        low, high = (low, middle) if fits else (middle + 1, high)
    groups = alone + _cut(others, costs, high)
    while len(groups) < parts and any(len(group) > 1 for group in groups):
        heaviest = max(range(len(groups)), key=lambda k: (len(groups[k]) > 1) * len(groups[k]) * costs[groups[k][0]])
        groups[heaviest : heaviest + 1] = _even_parts(groups[heaviest], 2)
    return groups + [[] for _ in range(parts - len(groups))]


def _cut(ordered: Sequence[int], costs: Sequence[int], tokens: int) -> list[list[int]]:
    """Consecutive groups that cost at most this many tokens each when padded, or hold one example."""
    groups: list[list[int]] = []
    for i in ordered:
        if groups and (len(groups[-1]) + 1) * costs[groups[-1][0]] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _balanced(ordered: Sequence[int], costs: Sequence[int], parts: int) -> list[list[int]]:
    """Assign examples, longest first, each to the group with the fewest tokens."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    lightest = [(0, part) for part in range(parts)]
    for i in ordered:
        load, part = heappop(lightest)
        groups[part].append(i)
        heappush(lightest, (load + costs[i], part))
    return groups


def _even_parts(items: Sequence[int], parts: int) -> list[list[int]]:
    size, longer = divmod(len(items), parts)
    cuts = [k * size + min(k, longer) for k in range(parts + 1)]
    return [list(items[a:b]) for a, b in pairwise(cuts)]


def microbatching(
    batch_size: int | None, micro: int | None, accumulation: int | None, tokens: int, world: int, default_batch: int
) -> tuple[int, Microbatching]:
    """The batch size and how it is split, from the given options.

    Args:
        batch_size: examples per update, if given.
        micro: examples per forward pass on each process, if given.
        accumulation: forward passes per update, if given.
        tokens: token budget of a forward pass on each process, if neither of these is given.
        world: number of processes.
        default_batch: the batch size if no option determines it.

    Raises:
        UsageError: all are given and do not multiply to the batch size.
    """
    if micro is not None and accumulation is not None:
        product = micro * accumulation * world
        if batch_size is not None and batch_size != product:
            raise UsageError(
                f"--batch-size {batch_size} is not --micro-batch-size {micro} × --gradient-accumulation {accumulation} "
                f"× {world} processes = {product}",
                fix="leave out one of them",
            )
        return product, Microbatching(micro=micro)
    size = batch_size if batch_size is not None else default_batch
    if accumulation is not None:
        return size, Microbatching(passes=accumulation)
    return size, Microbatching(micro=micro) if micro is not None else Microbatching(tokens=tokens)
