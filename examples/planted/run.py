"""The planted-reward experiment: does TIS-DPO find the tokens that matter, and does it help? One command, on a CPU.

`python examples/planted/run.py --seeds 0,1,2` prints a table and draws reward against KL; `--json` prints one object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from figures import PolicyResult, agreement, win_rate
from plot import curves
from policies import FLIP, Point, Policies, each_seed, lead, points_of, spread, start
from stages import Sizes, World

from tisdpo_cli.errors import TisdpoError
from tisdpo_cli.files import write_text

# What must hold of the means over seeds: (figure, at least?, bound).
EXPECTED = (
    ("auc_d", True, 0.95),
    ("auc_p", True, 0.95),
    ("spearman_d", True, 0.60),
    ("win_d", True, 0.65),
    ("win_p", True, 0.72),
    ("tis_minus_shuffled", True, 0.15),
    ("win_random", True, 0.44),
    ("win_random", False, 0.56),
    ("win_wrong", False, 0.20),
)


def run_seed(root: Path, sizes: Sizes, flips: Sequence[float], seed: int) -> dict[str, Any]:
    """All figures of a seed, and the points of its curves."""
    began = time.time()
    world, found = start(root, seed, sizes)
    policies = Policies(world)
    # The weights move a policy further: DPO needs more updates to reach their KL.
    steps = [step for step in sizes.asked if step <= sizes.compared]
    pairs = world.make_pairs(FLIP)
    scored = {method: world.score(pairs, method) for method in "DPS"}
    asked = {"DPO": policies.train("dpo", "train-dpo", pairs, sizes.asked)}
    asked["DPO, lr × 2"] = policies.train("dpo lr2", "train-dpo", pairs, steps, learning_rate=2 * sizes.learning_rate)
    for method, data in scored.items():
        asked[f"TIS-DPO {method}"] = policies.train(f"tis {method}", "train", data, steps)
    asked["D shuffled"] = policies.train("shuffled", "train", world.shuffled(scored["D"]), steps)
    asked["random"] = policies.train("random", "train", scored["D"], transform="random")
    return {
        "seed": world.seed,
        **_figures(world, asked, {m: agreement(scored[m]) for m in "DPS"}),
        "room": _room(points_of(asked["DPO"]), policies.best),
        "auc_gate": found,
        "win_wrong": _wrong_sign(world, policies),
        "flips": {f"{100 * flip:.0f}": _noise(world, policies, flip) for flip in flips},
        "curves": {name: _points(policies.start, steps) for name, steps in asked.items()},
        "best": [(0.0, policies.start.reward), *policies.best],
        "seconds": round(time.time() - began),
    }


def _room(dpo: Sequence[Point], best: Sequence[Point]) -> float | None:
    """How far DPO lies below the best possible at equal KL, in mean."""
    behind = lead(dpo, best)
    return None if behind is None else -behind


def _points(start_: PolicyResult, steps: Mapping[int, PolicyResult]) -> list[Point]:
    return [(0.0, start_.reward), *points_of(steps)]


def _figures(
    world: World, asked: Mapping[str, Mapping[int, PolicyResult]], agreed: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    at = world.sizes.compared
    dpo = asked["DPO"][at]
    names = {
        "d": "TIS-DPO D", "p": "TIS-DPO P", "s": "TIS-DPO S", "shuffled": "D shuffled", "random": "random",
        "dpo_lr2": "DPO, lr × 2",
    }  # fmt: skip
    made: dict[str, Any] = {
        f"{key}_{method.lower()}": value for method, of in agreed.items() for key, value in of.items()
    }
    made |= {f"win_{key}": win_rate(asked[name][at], dpo) for key, name in names.items()}
    made["tis_minus_shuffled"] = made["win_d"] - made["win_shuffled"]
    for name, steps in asked.items():
        made[f"reward: {name}"], made[f"kl: {name}"] = steps[at].reward, steps[at].kl
        made[f"win: {name}"] = win_rate(steps[at], dpo)
        if len(steps) > 1:
            made[f"at equal kl: {name}"] = lead(points_of(steps), points_of(asked["DPO"]))
    return made


def _wrong_sign(world: World, policies: Policies) -> float:
    """Win rate of the wrong sign against DPO, both on clean labels."""
    clean = world.make_pairs(0.0)
    at = world.sizes.compared
    dpo = policies.train("dpo 0", "train-dpo", clean)[at]
    return win_rate(policies.train("wrong", "train", world.turned(world.score(clean, "D")))[at], dpo)


def _noise(world: World, policies: Policies, flip: float) -> dict[str, float]:
    """Rewards under label noise, and win rates against DPO under the same noise."""
    pairs, at = world.make_pairs(flip), world.sizes.compared
    mark = f"{100 * flip:.0f}"
    dpo = policies.train(f"dpo {mark}", "train-dpo", pairs)[at]
    made = {"reward dpo": dpo.reward}
    for method in "DPS":
        of = policies.train(f"tis {method} {mark}", "train", world.score(pairs, method))[at]
        made |= {f"reward {method}": of.reward, f"win {method}": win_rate(of, dpo)}
    return made


# Telling ----------------------------------------------------------------------------------------------------------


def means(seeds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every figure over the seeds that have it."""
    made = {}
    for name in seeds[0]:
        values = [seed[name] for seed in seeds if isinstance(seed[name], (int, float))]
        if values and name not in ("seed", "seconds"):
            made[name] = statistics.fmean(values)
    return made


def table(seeds: Sequence[Mapping[str, Any]], compared: int) -> str:
    """What was found, as Markdown; ± is one standard error over seeds."""
    used = ", ".join(str(seed["seed"]) for seed in seeds)
    lines = [f"Seeds {used}. Held-out prompts, policies after {compared} updates, win rates against DPO there.", ""]
    lines += [
        "| scores | AUC, good against bad | rank correlation with the true reward | spread of r on neutral tokens |"
    ]
    lines += ["|---|---|---|---|"]
    for method in "dps":
        cells = [spread(seeds, f"{name}_{method}") for name in ("auc", "spearman", "neutral")]
        lines.append(f"| {method.upper()} | {' | '.join(cells)} |")
    lines += ["", "| policy | reward | KL | win rate | lead over DPO at equal KL |", "|---|---|---|---|---|"]
    for name in seeds[0]["curves"]:
        cells = [spread(seeds, f"{what}: {name}") for what in ("reward", "kl", "win", "at equal kl")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| the best possible | – | – | – | {spread(seeds, 'room')} |")
    lines += ["", f"Wrong sign, clean labels: win rate {spread(seeds, 'win_wrong')}.", *_noise_table(seeds)]
    return "\n".join(lines)


def _noise_table(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    if not seeds[0]["flips"]:
        return []
    lines = ["", "| labels turned | DPO: reward | D: reward, win rate | P | S |", "|---|---|---|---|---|"]
    for flip in seeds[0]["flips"]:
        rows = [seed["flips"][flip] for seed in seeds]
        cells = [", ".join(spread(rows, f"{what} {m}") for what in ("reward", "win")) for m in "DPS"]
        lines.append(f"| {flip} % | {spread(rows, 'reward dpo')} | {' | '.join(cells)} |")
    return lines


def verdicts(found: Mapping[str, float], seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was expected and whether it is so; and what is not better."""
    said = []
    for name, at_least, bound in EXPECTED:
        every = [seed[name] for seed in seeds]
        # The contrasts must tell good from bad in every seed.
        value = min(every) if name.startswith("auc") else found[name]
        holds = value >= bound if at_least else value <= bound
        said.append(
            f"{'as expected' if holds else 'NOT AS EXPECTED'}: {name} {value:.3f} {'≥' if at_least else '≤'} {bound}"
        )
    for name in ("TIS-DPO D", "TIS-DPO P", "TIS-DPO S"):
        lead = found.get(f"at equal kl: {name}")
        if lead is not None:
            said.append(
                f"at equal KL {name} is {'better' if lead > 0 else 'not better'} than DPO: {lead:+.3f} in reward"
            )
    said.append(f"DPO with twice the learning rate wins {found['win_dpo_lr2']:.3f} against DPO, with no weights at all")
    return said


def picture(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Reward against KL: means over seeds, step by step."""
    shown = [name for name, points in seeds[0]["curves"].items() if len(points) > 2]
    every = {name: [seed["curves"][name] for seed in seeds] for name in shown}
    every["the best possible"] = [seed["best"] for seed in seeds]
    of = {
        name: [
            (statistics.fmean(kl for kl, _ in points), statistics.fmean(reward for _, reward in points))
            for points in zip(*lines, strict=True)
        ]
        for name, lines in every.items()
    }
    farthest = 1.5 * max(kl for kl, _ in of["DPO"])
    return curves(of, "KL(policy ‖ SFT) of a response, nats", "true reward of a response", farthest)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment and tell what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas between them (0,1,2)")
    parser.add_argument("--flip", default="", help="percentages of labels turned, for a table: 0,10,25,40")
    parser.add_argument("--output-dir", default="out/planted", help="where everything is kept (out/planted)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    root, sizes = Path(given.output_dir), Sizes()
    flips = [float(part) / 100 for part in given.flip.split(",") if part]
    seeds = []
    for of in each_seed(partial(run_seed, root, sizes, flips), [int(seed) for seed in given.seeds.split(",")]):
        seeds.append(of)
        print(f"seed {of['seed']}: {of['seconds']} s", file=sys.stderr)
    found = means(seeds)
    write_text(root / "reward_kl.svg", picture(seeds))
    told = "\n".join([table(seeds, sizes.compared), "", *verdicts(found, seeds), f"plot: {root / 'reward_kl.svg'}"])
    if given.json:
        print(told, file=sys.stderr)
        print(json.dumps({"means": found, "seeds": seeds}))
    else:
        print(told)


if __name__ == "__main__":
    try:
        main()
    except TisdpoError as fault:
        sys.exit(f"error: {fault}")
