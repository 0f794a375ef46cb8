"""The whole method: three trainings and one estimation, against three trainings with TRL and the dense estimation.

    python tests/benchmarks/pipeline.py
    python tests/benchmarks/pipeline.py --dtype bf16

All stages run in one process on each side, ours with an empty cache at the beginning. TRL's third training stands for
the token-weighted one, which it does not have. Imports and the loading of models are outside.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import answer, compared, in_processes, measured, parser, prepare, table
from sides import clock_of_trl, import_here, out, score_dense, score_here, train_here, trl_trainer


def worker(asked: Namespace, record: dict[str, Any]) -> None:
    """One measured run."""
    if asked.worker == "tisdpo":
        loading = import_here(asked.where)
        with measured(record, loading):
            data = asked.where / "data"
            for command in ("train-dpo", "train-reverse"):
                train_here(asked.where, command, data, asked.dtype)
            scored = score_here(asked.where, out() / "train-dpo", out() / "train-reverse")
            train_here(asked.where, "train", scored, asked.dtype)
        return
    reference = clock_of_trl()
    trainers = [
        trl_trainer(asked.where, asked.dtype, asked.worker != "trl", swapped) for swapped in (False, True, False)
    ]
    with measured(record, before=reference):
        for trainer in trainers:
            trainer.train()
        score_dense(asked.where, [trainer.model for trainer in trainers[:2]], trainers[0].processing_class)


def main() -> None:
    """Both sides, interleaved."""
    options = parser(str(__doc__).splitlines()[0], pairs=48)
    options.add_argument(
        "--dtype", choices=("float32", "bf16"), default="float32", help="what the trainings compute in"
    )
    asked = options.parse_args()
    if asked.worker is not None:
        answer(asked, worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(asked, Path(folder))
        names = ["tisdpo", "trl", "trl, reference precomputed"]
        found = in_processes(__file__, names, ["--where", folder, "--dtype", asked.dtype], asked.rounds)
    ratios = compared(found, "tisdpo", names[1:])
    if asked.json:
        print(json.dumps({**ratios, "dtype": asked.dtype, "pairs": asked.pairs, "runs": found}))
        return
    print(f"three trainings and an estimation of {asked.pairs} pairs, {asked.dtype}\n")
    print(table(found, asked.pairs, "pairs"))
    print(f"\n{ratios['speed_ratio']:.2f} times as fast as with {ratios['against']}, "
          f"{ratios['memory_ratio']:.2f} of its peak memory")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
