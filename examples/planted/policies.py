"""Policies of a world, each trained and asked once, and how they are held against each other at equal KL."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from figures import PolicyResult, ask, best_possible, gate, read_asked, write_asked
from stages import Sizes, World

from tisdpo_cli.engine.evaluation.statistics import interpolate
from tisdpo_cli.model.loading import load_model

# What a seed is made again with where its starting model has not learned what good is, and how often.
_NEXT_SEED, _TRIES = 1000, 3
_GATE = 0.95
# KL and reward.
Point = tuple[float, float]
# The share of turned labels, unless another is asked for.
FLIP = 0.25


def start(root: Path, seed: int, sizes: Sizes) -> tuple[World, float]:
    """The first world of a seed whose starting model tells good from bad; and its AUC there.

    Raises:
        SystemExit: none of the tries has learned it.
    """
    for again in range(_TRIES + 1):
        world = World(root / str(seed + again * _NEXT_SEED), seed + again * _NEXT_SEED, sizes)
        world.make_sft()
        found = gate(world)
        if found > _GATE:
            return world, found
        print(f"seed {world.seed}: AUC of the prompt contrast {found:.3f}, made again", file=sys.stderr)
    raise SystemExit(f"seed {seed}: the starting model has not learned what good is in {_TRIES + 1} tries")


def each_seed(work: Callable[[int], dict[str, Any]], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Figures of every seed in order, several seeds at a time.

    Each is computed on one thread: sums in another order are another draw here, and the figures of a seed should not
    depend on how many cores there are.
    """
    alone = partial(_on_one_thread, work)
    if len(seeds) == 1:
        yield alone(seeds[0])
        return
    workers = min(len(seeds), os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(alone, seeds)
    finally:
        # After a fault no other seed is begun.
        pool.shutdown(cancel_futures=True)


def _on_one_thread(work: Callable[[int], dict[str, Any]], seed: int) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(seed)
    finally:
        torch.set_num_threads(before)


class Policies:
    """The policies of a world, each trained and asked once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sft = load_model(world.root / "sft")
        self.start = ask(world, self.sft, self.sft)

    @cached_property
    def best(self) -> list[Point]:
        """KL and reward of the best possible policies."""
        return best_possible(self.world, self.sft)

    def train(
        self, name: str, command: str, data: Path, steps: Sequence[int] = (), **settings: Any
    ) -> dict[int, PolicyResult]:
        """Train a policy and ask it after some updates, by default those after which policies are compared."""
        name, steps = name.replace(" ", "-"), steps or [self.world.sizes.compared]
        kept = self.world.root / f"{name}.json"
        if not kept.is_file():
            saved = {"max_steps": max(steps), "save_every": 2, "keep_checkpoints": max(steps)}
            made = self.world.policy(command, name, data, **saved, **settings)
            write_asked(kept, {step: ask(self.world, of, self.sft) for step, of in self.world.along(made, steps)})
            self.world.forget(made)
        return read_asked(kept)


def points_of(asked: Mapping[int, PolicyResult]) -> list[Point]:
    """A training's policies, by updates."""
    return [(of.kl, of.reward) for of in asked.values()]


def lead(ours: Sequence[Point], theirs: Sequence[Point]) -> float | None:
    """Mean lead in reward at equal KL: at each policy of ours, theirs between the two policies around it.

    Reward grows with the root of KL; on straight lines over KL itself they would lie below their own curve. None where
    theirs reach the KL of none of ours.
    """
    over = [(_root(kl), reward) for kl, reward in theirs]
    leads = [reward - there for kl, reward in ours if (there := interpolate(over, _root(kl))) is not None]
    return statistics.fmean(leads) if leads else None


def _root(kl: float) -> float:
    # Estimated, the KL of a policy that hardly moved may lie below 0.
    return max(kl, 0.0) ** 0.5


def spread(seeds: Sequence[Mapping[str, Any]], name: str) -> str:
    """The mean of a figure over the seeds that have it, and its standard error."""
    values = [seed[name] for seed in seeds if isinstance(seed.get(name), (int, float))]
    if not values:
        return "–"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"
