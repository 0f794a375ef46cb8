"""DPO training here and with TRL's DPOTrainer: the same model, pairs, order and optimizer; losses side by side.

    python tests/benchmarks/train_vs_trl.py
    python tests/benchmarks/train_vs_trl.py --dtype bf16
    python tests/benchmarks/train_vs_trl.py --lengths ultrafeedback --pairs 24

Ours is measured with an empty cache: tokenising, the pass of the reference, training and saving are inside its time.
TRL is measured with and without its precomputed reference, which is inside its time too, and the faster counts; its
tokenising is outside. Imports and the loading of models are outside on both sides. Neither writes checkpoints or
evaluates.
"""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import answer, compared, in_processes, measured, parser, prepare, table
from sides import BATCH, clock_of_trl, import_here, losses_of, train_here, trl_trainer

TRL = ("trl", "trl, reference precomputed")


def worker(asked: Namespace, record: dict[str, Any]) -> None:
    """One measured run."""
    if asked.worker == "tisdpo":
        loading = import_here(asked.where)
        with measured(record, loading):
            losses = train_here(asked.where, "train-dpo", asked.where / "data", asked.dtype, layout=asked.layout)
    else:
        reference = clock_of_trl()
        trainer = trl_trainer(asked.where, asked.dtype, precompute=asked.worker == TRL[1])
        with measured(record, before=reference):
            trainer.train()
        losses = losses_of(trainer)
    record["losses"] = losses


def main() -> None:
    """Both sides, interleaved."""
    options = parser(str(__doc__).splitlines()[0], pairs=48)
    options.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="what both compute in")
    options.add_argument("--layout", default="auto", help="ours: auto, shared-prefix or separate")
    asked = options.parse_args()
    if asked.worker is not None:
        answer(asked, worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(asked, Path(folder))
        passed = ["--where", folder, "--dtype", asked.dtype, "--layout", asked.layout]
        found = in_processes(__file__, ["tisdpo", *TRL], passed, asked.rounds)
    ratios = compared(found, "tisdpo", TRL)
    losses = {name: records[0].pop("losses") for name, records in found.items()}
    for records in found.values():
        for record in records[1:]:
            record.pop("losses")
    if asked.json:
        facts = {"dtype": asked.dtype, "lengths": asked.lengths, "pairs": asked.pairs}
        print(json.dumps({**ratios, **facts, "runs": found, "losses": losses}))
        return
    print(f"{asked.pairs} pairs of {asked.data or asked.lengths} lengths, batches of {BATCH}, {asked.dtype}\n")
    print(table(found, asked.pairs, "pairs"))
    print(
        f"\n{ratios['speed_ratio']:.2f} times the pairs per second of {ratios['against']}, "
        f"{ratios['memory_ratio']:.2f} of its peak memory"
    )
    for name, values in losses.items():
        print(f"losses, {name}: {' '.join(f'{loss:.4f}' for loss in values)}")


if __name__ == "__main__":
    sys.exit(main())
