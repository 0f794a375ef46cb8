"""Time and memory of an epoch of train-dpo against length, number of pairs, vocabulary and size of the model.

    python tests/benchmarks/scaling.py

One thing is changed at a time. Beside them, for the model of the other benchmarks, how much of this machine's rate of
matrix products the training reaches: 6 multiplications and additions per weight and useful token for training, 2 for
the reference, over the seconds of both, against the products of the model's own shapes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import answer, feed_forward, in_processes, measured, middle, parser, prepare
from sides import import_here, train_here

CASES: dict[str, dict[str, Any]] = {
    "as in the other benchmarks": {},
    "half the pairs": {"pairs": 24},
    "long responses": {"lengths": "ultrafeedback"},
    "vocabulary 32,768": {"vocabulary": 32_768},
    "half the width": {"hidden": 128},
    "half the depth": {"layers": 3},
    "bf16": {"dtype": "bf16"},
}


def product_rate(hidden: int, dtype: str) -> float:
    """Multiplications and additions per second of a product of the model's shape."""
    import torch

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = torch.randn(2048, hidden).to(kind), torch.randn(hidden, feed_forward(hidden)).to(kind)
    best = 0.0
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        best = max(best, 10 * 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - began))
    return best


def worker(asked: Namespace, record: dict[str, Any]) -> None:
    """One measured epoch."""
    case = CASES[asked.worker]
    if case:
        apart = Namespace(**{**vars(asked), **{k: v for k, v in case.items() if k in ("pairs", "lengths")}})
        asked.where = Path(tempfile.mkdtemp())
        prepare(apart, asked.where, **{k: v for k, v in case.items() if k in ("vocabulary", "hidden", "layers")})
    dtype = case.get("dtype", "float32")
    loading = import_here(asked.where)
    with measured(record, loading):
        train_here(asked.where, "train-dpo", asked.where / "data", dtype)
    record["rate"] = product_rate(case.get("hidden", 256), dtype)
    record["work"] = useful_work(asked.where)


def useful_work(where: Path) -> float:
    """Multiplications and additions that an epoch and the pass of the reference cannot do without."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (of.from_pretrained(where / "model") for of in (AutoModelForCausalLM, AutoTokenizer))
    body = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    rows = [json.loads(line) for line in (where / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    sizes = [{name: len(tokenizer(text)["input_ids"]) for name, text in row.items()} for row in rows]
    scored = sum(size["chosen"] + size["rejected"] + 2 for size in sizes)
    tokens = scored + sum(size["prompt"] for size in sizes)
    return (6 + 2) * (body * tokens + head * scored)


def main() -> None:
    """A table of all cases."""
    asked = parser(str(__doc__).splitlines()[0], pairs=48).parse_args()
    if asked.worker is not None:
        answer(asked, worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(asked, Path(folder))
        passed = ["--where", folder, "--pairs", str(asked.pairs), "--lengths", asked.lengths]
        found = in_processes(__file__, list(CASES), passed, asked.rounds)
    shares = {name: max(r["work"] / r["seconds"] / r["rate"] for r in records) for name, records in found.items()}
    if asked.json:
        print(json.dumps({"runs": found, "share_of_product_rate": shares}))
        return
    print(f"{'':28s} {'seconds':>8s} {'peak MiB':>9s} {'of the product rate':>20s}")
    for name, records in found.items():
        print(f"{name:28s} {middle(records):8.2f} {middle(records, 'peak_mib'):9.0f} {shares[name]:20.0%}")


if __name__ == "__main__":
    sys.exit(main())
