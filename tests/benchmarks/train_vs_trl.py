"""DPO training here and with TRL's DPOTrainer: the same model, pairs, order and optimizer; losses side by side.

    python tests/benchmarks/train_vs_trl.py
    python tests/benchmarks/train_vs_trl.py --dtype bf16
    python tests/benchmarks/train_vs_trl.py --lengths ultrafeedback --pairs 24
    python tests/benchmarks/train_vs_trl.py --data FILE.jsonl
    python tests/benchmarks/train_vs_trl.py --model DIRECTORY --pairs 32 --rounds 1
    python tests/benchmarks/train_vs_trl.py --lora-r 8

Ours is measured with an empty cache: tokenising, the pass of the reference, training and saving are inside its time.
TRL is measured with and without its precomputed reference, which is inside its time too, and the faster counts; its
tokenising is outside. Imports and the loading of models are outside on both sides. Neither writes checkpoints or
evaluates. On a GPU the model has the shape of Qwen2.5-0.5B, both compute in bf16, and TRL also runs with the kernels of
Liger where liger-kernel is installed.
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
from sides import BATCH, clock_of_trl, import_here, losses_of, train_here, trl_sides, trl_trainer


def worker(asked: Namespace, record: dict[str, Any]) -> None:
    """One measured run."""
    if asked.worker == "tisdpo":
        loading = import_here(asked.where)
        with measured(record, loading):
            adapter = {"lora_r": asked.lora_r} if asked.lora_r else {}
            flags = {"layout": asked.layout, **adapter}
            losses = train_here(asked.where, "train-dpo", asked.where / "data", asked.dtype, **flags)
    else:
        reference = clock_of_trl()
        trainer = trl_trainer(asked.where, asked.dtype, asked.worker, lora_r=asked.lora_r or None)
        with measured(record, before=reference):
            trainer.train()
        losses = losses_of(trainer)
    record["losses"] = losses
    # An epoch, and the pass of the reference.
    utilisation(record, asked.where, 4, shape_of(asked.model), asked.dtype)


def main() -> None:
    """Both sides, interleaved."""
    options = parser(str(__doc__).splitlines()[0], pairs=48)
    options.add_argument("--layout", default="auto", help="ours: auto, shared-prefix or separate")
    options.add_argument("--lora-r", type=int, default=0, help="train adapters of this rank; 0 for none")
    asked = options.parse_args()
    if asked.worker is not None:
        answer(asked, worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(asked, Path(folder))
        passed = [*arguments(asked, Path(folder)), "--layout", asked.layout, "--lora-r", str(asked.lora_r)]
        found = in_processes(__file__, ["tisdpo", *trl_sides()], passed, asked.rounds)
    ratios = compared(found, "tisdpo", trl_sides())
    losses = {name: records[0].pop("losses") for name, records in found.items()}
    for records in found.values():
        for record in records[1:]:
            record.pop("losses")
    if asked.json:
        print(json.dumps({**ratios, **facts(asked), "runs": found, "losses": losses}))
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
    main()
