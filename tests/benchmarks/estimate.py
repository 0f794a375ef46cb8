"""Scoring here and by a plain dense implementation: padded rows, all logits, one log-softmax.

    python tests/benchmarks/estimate.py

Ours: `estimate`, with tokenising and writing inside its time. The dense one: tokenising and the forward passes of both
models; it writes nothing. Loading is outside for both. The largest difference of the scores is printed.
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
    make_other,
    measured,
    parser,
    prepare,
    shape_of,
    table,
    utilisation,
)
from sides import device, import_here, score_dense, score_here


def worker(asked: Namespace, record: dict[str, Any]) -> None:
    """One measured run; all scores, one after the other."""
    folders = (asked.where / "model", asked.where / "other")
    if asked.worker == "tisdpo":
        loading = import_here(asked.where)
        with measured(record, loading):
            path = score_here(asked.where, *folders, asked.dtype)
        rows = [json.loads(line) for line in (path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        record["scores"] = [
            -r
            for row in rows
            for side in ("chosen", "rejected")
            for r in (*row[f"{side}_weight"], row[f"{side}_eos_weight"])
        ]
    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        load = AutoModelForCausalLM.from_pretrained
        models = [load(folder, dtype=torch.float32).to(device()) for folder in folders]
        tokenizer = AutoTokenizer.from_pretrained(folders[0])
        with measured(record):
            found = score_dense(asked.where, models, tokenizer, asked.dtype)
        record["scores"] = [r for both in found for side in both for r in side]
    utilisation(record, asked.where, len(folders), shape_of(asked.model), asked.dtype)


def main() -> None:
    """Both sides, interleaved."""
    asked = parser(str(__doc__).splitlines()[0], pairs=64).parse_args()
    if asked.worker is not None:
        answer(asked, worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(asked, Path(folder))
        make_other(Path(folder) / "model", Path(folder) / "other", asked.seed + 1)
        found = in_processes(__file__, ["tisdpo", "dense"], arguments(asked, Path(folder)), asked.rounds)
    scores = {name: [record.pop("scores") for record in records] for name, records in found.items()}
    worst = max(abs(a - b) for a, b in zip(*(of_runs[0] for of_runs in scores.values()), strict=True))
    ratios = compared(found, "tisdpo", ("dense",))
    if asked.json:
        print(json.dumps({**ratios, **facts(asked), "largest_difference": worst, "runs": found}))
        return
    print(f"{asked.pairs} pairs of {asked.data or asked.lengths} lengths, two models, {asked.dtype}\n")
    print(table(found, asked.pairs, "pairs"))
    print(
        f"\n{ratios['speed_ratio']:.2f} times the pairs per second, {ratios['memory_ratio']:.2f} of the peak memory; "
        f"scores differ by {worst:.1e} nats at most"
    )


if __name__ == "__main__":
    main()
