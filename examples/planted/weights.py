"""Better weights? Steps, transforms and custom weights on the same scores, against DPO at equal KL over seeds.

`python examples/planted/weights.py --seeds 0,1,2,3,4` prints a table; what `run.py` has made is used again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from custom_weights import INVENTIONS
from figures import win_rate
from policies import FLIP, Policies, each_seed, lead, points_of, spread, start
from stages import Sizes

from tisdpo_cli.errors import TisdpoError

# Settings of `tisdpo train` on the scores of D.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "exp": {},
    "exp, center position": {"center": "position"},
    "exp, dead zone 1": {"dead_zone": 1.0},
    "exp, decay 0.9": {"decay": 0.9},
    "exp, spans word": {"spans": "word"},
    "exp, normalize mean": {"normalize": "mean"},
    "exp, mu 0.5": {"mu": 0.5},
    "exp, lr × 0.4": {"learning_rate": 1.2e-4},
    "rank_based": {"transform": "rank_based"},
}
# DPO itself at other learning rates: a policy that takes smaller steps averages over more pairs on its way to the same
# KL, and that alone is worth something.
CONTROLS: Mapping[str, float] = {"DPO, lr × 0.5": 0.5, "DPO, lr × 0.7": 0.7}


def run_seed(root: Path, sizes: Sizes, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Figures of a seed, by name of the weights."""
    world, _ = start(root, seed, sizes)
    policies, pairs = Policies(world), world.make_pairs(FLIP)
    scored = world.score(pairs, "D")
    dpo = policies.train("dpo", "train-dpo", pairs, sizes.asked)
    steps = [step for step in sizes.asked if step <= sizes.compared]
    made: dict[str, Any] = {}
    for name in names:
        if name in CONTROLS:
            rate = CONTROLS[name] * sizes.learning_rate
            asked = policies.train(f"control {CONTROLS[name]}", "train-dpo", pairs, sizes.asked, learning_rate=rate)
        elif name in PUBLISHED:
            # The published weights themselves are a policy of `run.py`.
            kept = f"weights {name}" if PUBLISHED[name] else "tis D"
            asked = policies.train(kept, "train", scored, steps, **PUBLISHED[name])
        else:
            data = world.weighed(scored, name, INVENTIONS[name])
            asked = policies.train(f"weights {name}", "train", data, steps, weights_are="final")
        last = asked[sizes.compared]
        made |= {
            f"reward: {name}": last.reward,
            f"kl: {name}": last.kl,
            f"lead: {name}": lead(points_of(asked), points_of(dpo)),
        }
        made[f"win: {name}"] = win_rate(last, dpo[sizes.compared])
    return made


def table(seeds: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """What was found, as Markdown; ± is one standard error over seeds."""
    lines = ["| weights | reward | KL | win rate | lead over DPO at equal KL | ahead in |", "|---|---|---|---|---|---|"]
    for name in names:
        leads = [seed[f"lead: {name}"] for seed in seeds if seed[f"lead: {name}"] is not None]
        cells = [spread(seeds, f"{what}: {name}") for what in ("reward", "kl", "win", "lead")]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(x > 0 for x in leads)} of {len(leads)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare weights and tell which are ahead."""
    every = [*CONTROLS, *PUBLISHED, *INVENTIONS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2,3,4", help="seeds, with commas between them (0,1,2,3,4)")
    parser.add_argument("--only", default="; ".join(every), help="some of the weights, with semicolons between them")
    parser.add_argument("--output-dir", default="out/planted", help="where everything is kept (out/planted)")
    given = parser.parse_args(arguments)
    names = [name.strip() for name in given.only.split(";")]
    unknown = [name for name in names if name not in every]
    if unknown:
        parser.error(f"no such weights: {', '.join(unknown)}; there are {'; '.join(every)}")
    sizes = Sizes()
    work = partial(run_seed, Path(given.output_dir), sizes, names)
    print(table(list(each_seed(work, [int(seed) for seed in given.seeds.split(",")])), names))


if __name__ == "__main__":
    try:
        main()
    except TisdpoError as fault:
        sys.exit(f"error: {fault}")
