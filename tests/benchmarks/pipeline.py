"""The whole method: three trainings and one estimation, against three trainings with TRL and the dense estimation.

    python tests/benchmarks/pipeline.py
    python tests/benchmarks/pipeline.py --dtype bf16

All stages run in one process on each side, ours with an empty cache at the beginning. TRL's third training stands for
the token-weighted one, which it does not have. Imports and the loading of models are outside.
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import (
    answer,
    arguments,
    compared,
    facts,
    in_processes,
    measured,
    parser,
    prepare,
    shape_of,
    table,
    utilisation,
)
from sides import clock_of_trl, import_here, out, score_dense, score_here, train_here, trl_sides, trl_trainer


def worker(asked: Namespace, record: dict[str, Any]) -> None:
    """One measured run."""
    if asked.worker == "tisdpo":
        loading = import_here(asked.where)
        with measured(record, loading):
            data = asked.where / "data"
            for command in ("train-dpo", "train-reverse"):
                train_here(asked.where, command, data, asked.dtype)
            scored = score_here(asked.where, out() / "train-dpo", out() / "train-reverse", asked.dtype)
            train_here(asked.where, "train", scored, asked.dtype)
    else:
        reference = clock_of_trl()
        trainers = [trl_trainer(asked.where, asked.dtype, asked.worker, swapped) for swapped in (False, True, False)]
        with measured(record, before=reference):
            for trainer in trainers:
                trainer.train()
            models = [trainer.model for trainer in trainers[:2]]
            score_dense(asked.where, models, trainers[0].processing_class, asked.dtype)
    # Three epochs, one pass of the reference, and the scores of two models.
    utilisation(record, asked.where, 3 * 3 + 1 + 2, shape_of(asked.model), asked.dtype)


def main() -> None:
    """Both sides, interleaved."""
    asked = parser(str(__doc__).splitlines()[0], pairs=48).parse_args()
    if asked.worker is not None:
        answer(asked, worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(asked, Path(folder))
        found = in_processes(__file__, ["tisdpo", *trl_sides()], arguments(asked, Path(folder)), asked.rounds)
    ratios = compared(found, "tisdpo", trl_sides())
    if asked.json:
        print(json.dumps({**ratios, **facts(asked), "runs": found}))
        return
    print(f"three trainings and an estimation of {asked.pairs} pairs, {asked.dtype}\n")
    print(table(found, asked.pairs, "pairs"))
    print(f"\n{ratios['speed_ratio']:.2f} times as fast as with {ratios['against']}, "
          f"{ratios['memory_ratio']:.2f} of its peak memory")  # fmt: skip


if __name__ == "__main__":
    main()
