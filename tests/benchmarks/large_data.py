"""Data larger than memory: seconds and resident memory of commands against the number of pairs.

    python tests/benchmarks/large_data.py --counts 10000 100000
    python tests/benchmarks/large_data.py --counts 10000 --scores

Every count is a file of random words. On it, `train-dpo --dry-run` starts twice, the second time with everything read
and tokenized before, and a training runs to its first update. With `--scores`, two models score the pairs, the weights
are inspected, and `train` runs to its first update. Memory is the most that any one process had resident, pages of
mapped files included; it has the model in it. Beside them, tokens per second of reading and tokenizing the first count,
in one process and in several.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Shape, make_model, words

TINY = Shape(hidden=64, feed_forward=128, layers=2, heads=2, key_heads=2)
FEW = ("--batch-size", "8", "--eval-pairs", "0", "--warmup-steps", "0", "--max-steps", "1")
STARTS = ("first start", "second start", "to the first update")
SCORES = ("estimate", "inspect-weights", "train to the first update")


def write_pairs(path: Path, count: int, tokens: int, seed: int) -> None:
    """A file of pairs with this many tokens each, in thirds, row by row."""
    draw, every = random.Random(seed), words()

    def text() -> str:
        return "".join(draw.choices(every, k=max(1, tokens // 3)))

    with path.open("w", encoding="utf-8") as stream:
        for i in range(count):
            row = {"prompt": f"{i}:{text()}", "chosen": text(), "rejected": text()}
            stream.write(json.dumps(row) + "\n")


def program(where: Path, *options: str | Path) -> dict[str, float]:
    """Wall and CPU seconds of a command, processes that it starts included, and the largest of them in MiB."""
    command = [sys.executable, "-m", "tisdpo_cli", *map(str, options)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TISDPO_CACHE_DIR": str(where / "cache")}
    began = time.perf_counter()
    with (where / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit((where / "log").read_text()[-3000:])
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        # Linux counts in KiB, macOS in bytes.
        "peak_mib": used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
    }


def tokenized(where: Path, data: Path, processes: int) -> dict[str, float]:
    """Reading and tokenizing in this many processes, without a start of the program."""
    from tisdpo_cli.data import tokenizing
    from tisdpo_cli.data.dataset import Columns, DatasetSplit, Part
    from tisdpo_cli.data.pairs import read_split_pairs
    from tisdpo_cli.data.row_store import RowStore
    from tisdpo_cli.data.tokens import Limits
    from tisdpo_cli.engine.chat import vocabulary_of
    from tisdpo_cli.model.tokenizer import load_tokenizer

    tokenizing._cores = lambda: processes
    if processes > 1:
        tokenizing._BYTES_PER_PROCESS = 1
    vocabulary = vocabulary_of(load_tokenizer(where / "model"))
    with tempfile.TemporaryDirectory() as cache:
        store = RowStore(Path(cache))
        began = time.perf_counter()
        pairs = read_split_pairs(DatasetSplit((Part("data", data, Columns()),)), "error", store).pairs
        read = time.perf_counter()
        tokens = tokenizing.tokenize(pairs, tokenizing.TokenOptions(Limits()), vocabulary, store)
        done = time.perf_counter()
    total = int(tokens.encoded.lengths().sum())
    return {"read_seconds": read - began, "seconds": done - read, "tokens_per_second": total / (done - read)}


def options() -> argparse.Namespace:
    """What is measured."""
    made = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000], help="pairs of each file")
    made.add_argument("--tokens", type=int, default=60, help="tokens of a pair, roughly")
    made.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="how many tokenize")
    made.add_argument("--scores", action="store_true", help="score the pairs too, and use the scores")
    made.add_argument("--rounds", type=int, default=1, help="how often all of it is measured")
    made.add_argument("--seed", type=int, default=0, help="of data and model")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made.parse_args()


def measure(asked: argparse.Namespace, count: int) -> dict[str, Any]:
    """All starts with one file."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        make_model(where / "model", asked.seed, TINY)
        data = where / "pairs.jsonl"
        write_pairs(data, count, asked.tokens, asked.seed)
        record: dict[str, Any] = {"file_mib": data.stat().st_size / 2**20}
        if count == asked.counts[0]:
            record["tokenizing"] = {str(number): tokenized(where, data, number) for number in asked.processes}
        inputs = ("train-dpo", "-m", where / "model", "-d", data, "-o", where / "dpo")
        for start, more in zip(STARTS, (("--dry-run",), ("--dry-run",), FEW), strict=True):
            record[start] = program(where, *inputs, *more)
        if asked.scores:
            make_model(where / "other", asked.seed + 1, TINY)
            sides = ("--forward", where / "model", "--reverse", where / "other")
            commands = (
                ("estimate", *sides, "-d", data, "-o", where / "scored", "--batch-size", "64"),
                ("inspect-weights", where / "scored", "--index", "3"),
                ("train", "-m", where / "model", "-d", where / "scored", "-o", where / "tisdpo", *FEW),
            )
            for name, command in zip(SCORES, commands, strict=True):
                record[name] = program(where, *command)
        record["cache_mib"] = sum(file.stat().st_size for file in (where / "cache").rglob("*.arrow")) / 2**20
    return record


def main() -> None:
    """A table of all counts."""
    asked = options()
    found = {str(count): [measure(asked, count) for _ in range(asked.rounds)] for count in asked.counts}
    if asked.json:
        print(json.dumps({"runs": found}))
        return
    for count, records in found.items():
        for record in records:
            print(f"{count} pairs, file {record['file_mib']:.1f} MiB, cache {record['cache_mib']:.1f} MiB")
            print(f"{'':30s}   seconds  CPU seconds  peak MiB")
            for name in (*STARTS, *SCORES):
                if of := record.get(name):
                    print(f"  {name:28s} {of['seconds']:9.1f} {of['cpu_seconds']:12.1f} {of['peak_mib']:9.0f}")
            for number, of in record.get("tokenizing", {}).items():
                print(
                    f"           tokenized by {number}: {of['tokens_per_second']:,.0f} tokens/s, {of['seconds']:.1f} s "
                    f"(and {of['read_seconds']:.1f} s to read)"
                )


if __name__ == "__main__":
    main()
