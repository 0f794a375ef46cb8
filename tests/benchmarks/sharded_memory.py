"""Peak memory of each process while a model is trained whole on each, and sharded over them.

    python tests/benchmarks/sharded_memory.py

A random model of about 200 M parameters on CPU processes; the losses must agree. `--shape small` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Shape, make_model, make_pairs

SHAPES = {"small": Shape(), "200m": Shape(1024, 2816, 12, 16, 16, 32_000)}
WAYS = {"whole": "none", "sharded": "full"}


def worker(directory: Path, way: str, options: dict[str, str]) -> None:
    """One process of a training; writes its peak and the losses."""
    import torch

    from tisdpo_cli.engine.training.preference import train_pairs
    from tisdpo_cli.reporter import Silent
    from tisdpo_cli.settings.sources import load
    from tisdpo_cli.settings.train_pairs import TrainDpo

    before = peak()
    given = {
        "model": str(directory / "model"), "dataset": str(directory / "data"), "output_dir": str(directory / way),
        "no_ref_cache": True, "eval_pairs": "0", "warmup_steps": "0", "shard": WAYS[way], **options,
    }  # fmt: skip
    settings = load(TrainDpo, given).settings
    assert isinstance(settings, TrainDpo)
    train_pairs(settings, Silent())
    record = {"start_mib": before, "peak_mib": peak()}
    (directory / f"{way}-{os.environ['RANK']}.json").write_text(json.dumps(record))
    torch.distributed.barrier()
    # Threads of the process group would abort an interpreter that shuts down.
    os._exit(0)


def peak() -> int:
    """Peak resident memory of this process so far, in MiB. (That of `getrusage` begins with its parent's.)"""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def measure(directory: Path, way: str, processes: int, options: dict[str, str]) -> dict[str, list[float]]:
    """A training in processes of its own: start and peak of each, and the losses."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, __file__, "--worker", str(directory), way, json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    records = [json.loads((directory / f"{way}-{rank}.json").read_text()) for rank in range(processes)]
    lines = (directory / way / "metrics.jsonl").read_text().splitlines()
    return {
        **{name: [record[name] for record in records] for name in records[0]},
        "losses": [json.loads(line)["loss"] for line in lines],
    }


def main() -> None:
    """A table of both ways."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--shape", choices=SHAPES, default="200m")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--pairs", type=int, default=8)
    options.add_argument("--max-steps", type=int, default=2)
    options.add_argument("--optimizer", default="rmsprop")
    options.add_argument("--json", action="store_true")
    options.add_argument("--worker", nargs=3, default=None, help=argparse.SUPPRESS)
    options.add_argument("--rounds", type=int, default=1, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.worker is not None:
        directory, way, given = asked.worker
        worker(Path(directory), way, json.loads(given))
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_model(directory / "model", 0, SHAPES[asked.shape])
        (directory / "data").mkdir()
        rows = [json.dumps(row) for row in make_pairs(asked.pairs, "hh", 0)]
        (directory / "data" / "train.jsonl").write_text("\n".join(rows) + "\n")
        given = {"max_steps": str(asked.max_steps), "batch_size": str(asked.pairs), "micro_batch_size": "1",
                 "max_length": "128", "max_prompt_length": "64", "optimizer": asked.optimizer}  # fmt: skip
        found = {way: measure(directory, way, asked.processes, given) for way in WAYS}
    if asked.json:
        print(json.dumps(found))
        return
    print(f"{'model':10s} {'start MiB':>16s} {'peak MiB':>16s}  losses")
    for way, record in found.items():
        start, top = ("/".join(f"{value:.0f}" for value in record[name]) for name in ("start_mib", "peak_mib"))
        print(f"{way:10s} {start:>16s} {top:>16s}  {' '.join(f'{loss:.6f}' for loss in record['losses'])}")


if __name__ == "__main__":
    main()
