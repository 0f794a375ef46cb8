"""Policies of a world, each trained and asked once, and how they are held against each other at equal KL."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figures import Asked, ask, gate, read_asked, write_asked
from stages import Sizes, World

from tisdpo_cli.engine.measures import between
from tisdpo_cli.models import load_model

# What a seed is made again with where its starting model has not learned what good is, and how often.
_NEXT_SEED, _TRIES = 1000, 3
_GATE = 0.95
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
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(alone, seeds)


def _on_one_thread(work: Callable[[int], dict[str, Any]], seed: int) -> dict[str, Any]:
    with _threads(1):
        return work(seed)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Policies:
    """The policies of a world, each trained and asked once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sft = load_model(world.root / "sft")
        self.start = ask(world, self.sft, self.sft)

    def train(
        self, name: str, command: str, data: Path, steps: Sequence[int] = (), **settings: Any
    ) -> dict[int, Asked]:
        """Train a policy and ask it after some updates, by default those after which policies are compared."""
        name, steps = name.replace(" ", "-"), steps or [self.world.sizes.compared]
        kept = self.world.root / f"{name}.json"
        if not kept.is_file():
            saved = {"max_steps": max(steps), "save_every": 2, "keep_checkpoints": max(steps)}
            made = self.world.policy(command, name, data, **saved, **settings)
            write_asked(kept, {step: ask(self.world, of, self.sft) for step, of in self.world.along(made, steps)})
            self.world.forget(made)
        return read_asked(kept)


def lead(ours: Mapping[int, Asked], dpo: Mapping[int, Asked]) -> float | None:
    """Mean lead in reward over DPO at equal KL: at each policy of ours, DPO between its two policies around it.

    None where DPO reaches the KL of none of them.
    """
    points = [(of.kl, of.reward) for of in dpo.values()]
    leads = [of.reward - there for of in ours.values() if (there := between(points, of.kl)) is not None]
    return statistics.fmean(leads) if leads else None


def spread(seeds: Sequence[Mapping[str, Any]], name: str) -> str:
    """The mean of a figure over the seeds that have it, and its standard error."""
    values = [seed[name] for seed in seeds if isinstance(seed.get(name), (int, float))]
    if not values:
        return "–"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"
