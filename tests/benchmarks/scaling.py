"""Time and memory of an epoch of train-dpo against length, number of pairs, vocabulary and size of the model.

    python tests/benchmarks/scaling.py

One thing is changed at a time. Beside them, how much of this machine's rate of matrix products is reached, against
products of the model's own shapes: 6 multiplications and additions per weight and useful token over the seconds of the
updates alone, and 6 + 2, with those of the reference, over the seconds of the whole command.
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from common import (
    Shape,
    answer,
    arguments,
    in_processes,
    measured,
    middle,
    parser,
    prepare,
    shape_of,
    utilisation,
)
from sides import import_here, seconds_of_updates, train_here


class Case(NamedTuple):
    """What is measured."""

    pairs: int
    lengths: str
    dtype: str
    shape: Shape


def _narrow(shape: Shape) -> Shape:
    halves = {name: getattr(shape, name) // 2 for name in ("hidden", "feed_forward", "heads", "key_heads")}
    return replace(shape, **halves)


CASES: dict[str, Callable[[Case], Case]] = {
    "as in the other benchmarks": lambda case: case,
    "half the pairs": lambda case: case._replace(pairs=case.pairs // 2),
    "long responses": lambda case: case._replace(lengths="ultrafeedback"),
    "4 times the vocabulary": lambda case: case._replace(
        shape=replace(case.shape, vocabulary=4 * case.shape.vocabulary)
    ),
    "half the width": lambda case: case._replace(shape=_narrow(case.shape)),
    "half the depth": lambda case: case._replace(shape=replace(case.shape, layers=case.shape.layers // 2)),
    "the other precision": lambda case: case._replace(dtype="bf16" if case.dtype == "float32" else "float32"),
}


def worker(asked: Namespace, record: dict[str, Any]) -> None:
    """One measured epoch."""
    case = CASES[asked.worker](Case(asked.pairs, asked.lengths, asked.dtype, shape_of(asked.model)))
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        prepare(Namespace(**{**vars(asked), "pairs": case.pairs, "lengths": case.lengths}), where, case.shape)
        loading = import_here(where)
        with measured(record, loading):
            train_here(where, "train-dpo", where / "data", case.dtype)
        # An epoch, and the pass of the reference.
        utilisation(record, where, 4, case.shape, case.dtype)
    seconds = seconds_of_updates("train-dpo")
    record["utilisation_of_updates"] = record["work"] * 3 / 4 / seconds / record["product_rate"]


def main() -> None:
    """A table of all cases."""
    asked = parser(str(__doc__).splitlines()[0], pairs=48).parse_args()
    if asked.worker is not None:
        answer(asked, worker)
        return
    found = in_processes(__file__, list(CASES), arguments(asked), asked.rounds)
    if asked.json:
        print(json.dumps({"runs": found}))
        return
    print(f"{'':28s} {'seconds':>8s} {'peak MiB':>9s} {'of the product rate':>20s} {'updates alone':>14s}")
    for name, records in found.items():
        memory, whole, updates = (middle(records, of) for of in ("peak_mib", "utilisation", "utilisation_of_updates"))
        print(f"{name:28s} {middle(records):8.2f} {memory:9.0f} {whole:20.0%} {updates:14.0%}")


if __name__ == "__main__":
    main()
