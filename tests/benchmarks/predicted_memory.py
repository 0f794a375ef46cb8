"""Peak memory of a training beside what its dry run predicts, on a CPU.

    python tests/benchmarks/predicted_memory.py --lora-r 8

Each runs in a process of its own, with random models of about 5 and 40 M parameters. Options that are not listed go to
`train-dpo`.
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

SHAPES = {"5m": Shape(256, 640, 4, 4, 4), "40m": Shape(512, 1408, 8, 8, 8, 16_000)}
# The peak of a process of its own: the usual counter starts with that of the process that started it.
RUN = """
import sys
from tisdpo_cli.cli.start import main
try:
    main()
finally:
    peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]
    print("peak", peak, file=sys.stderr)
"""


def run(directory: Path, more: list[str]) -> tuple[str, int]:
    """Stdout of a training, and its peak memory in KiB."""
    options = ["-m", "model", "-d", "data", "-o", "out", "--no-ref-cache", "--batch-size", "8", "--eval-pairs", "0"]
    command = [sys.executable, "-c", RUN, "train-dpo", *options, "--max-steps", "2", "--warmup-steps", "0", *more]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return done.stdout, int(done.stderr.rsplit("peak ", 1)[1])


def main() -> None:
    """A table of shapes."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--json", action="store_true")
    options.add_argument("--rounds", type=int, default=1, help=argparse.SUPPRESS)
    asked, more = options.parse_known_args()
    found = {}
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            make_model(directory / "model", 0, shape)
            (directory / "data").mkdir()
            rows = [json.dumps(row) for row in make_pairs(8, "hh", 0)]
            (directory / "data" / "train.jsonl").write_text("\n".join(rows) + "\n")
            prediction = json.loads(run(directory, [*more, "--dry-run", "--json"])[0])["prediction"]
            found[name] = {
                "predicted_mib": prediction["memory_total"] / 2**20, "peak_mib": run(directory, more)[1] / 2**10,
            }  # fmt: skip
    if asked.json:
        print(json.dumps({"shapes": found}))
        return
    for name, record in found.items():
        print(f"{name:5s} predicted {record['predicted_mib']:.0f} MiB, peak {record['peak_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
