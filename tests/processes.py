"""Several processes for tests: launched by torchrun, each running a command, or many jobs one after the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conftest import Done, read_jsonl

import tisdpo_cli

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
CPU = {"OMP_NUM_THREADS": "1"}
PROGRAM = ("-m", "tisdpo_cli")
Job = tuple[str, dict[str, object]]

# A start takes seconds, so many jobs share one.
_JOBS = """
import json, os, sys
import torch
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.engine.training.sft import train_sft
from tisdpo_cli.reporter import Silent
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

for command, settings in json.loads(sys.argv[1]):
    flags = {name: value if isinstance(value, bool) else str(value) for name, value in settings.items()}
    engine = train_sft if command == "train-sft" else train_pairs
    engine(load(COMMANDS[command].settings, flags).settings, Silent())
if "LOCAL_RANK" in os.environ:
    # Threads of the process group would abort an interpreter that shuts down.
    torch.distributed.barrier()
    os._exit(0)
"""


def arguments(command: str, settings: dict[str, object]) -> list[str]:
    """The words of a command."""
    words = [command]
    for name, value in settings.items():
        if value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def start(ranks: int, words: Sequence[str], program: Sequence[str] = PROGRAM, env: dict[str, str] = CPU):
    """A program on several processes, running in a session of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    return subprocess.Popen(
        [*LAUNCHER, str(ranks), *program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**kept, "PYTHONPATH": str(Path(tisdpo_cli.__file__).parents[1]), **env}, start_new_session=True,
    )  # fmt: skip


def on_ranks(ranks: int, command: str, **settings: object) -> Done:
    """Run a command on several processes."""
    process = start(ranks, arguments(command, settings))
    out, err = process.communicate(timeout=240)
    return Done(process.returncode, out, err)


def run_jobs(ranks: int, jobs: Sequence[Job], folder: Path) -> None:
    """Run trainings one after the other on several processes, or on one in this process."""
    text = json.dumps(jobs, default=str)
    if ranks == 1:
        argv, sys.argv = sys.argv, ["jobs", text]
        try:
            exec(compile(_JOBS, "jobs", "exec"), {})
        finally:
            sys.argv = argv
        return
    program = folder / "jobs.py"
    program.write_text(_JOBS, encoding="utf-8")
    process = start(ranks, [text], program=[str(program)])
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-6000:]


def curve(out: Path) -> list[dict[str, float]]:
    """The metrics of a training, without speeds."""
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [{name: value for name, value in row.items() if not name.endswith("_per_second")} for row in rows]


def with_dynamic_rope(model: Path, copy: Path, positions: int) -> Path:
    """A copy of a model whose rope scaling depends on the longest row beyond so many positions."""
    shutil.copytree(model, copy)
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config["max_position_embeddings"] = positions
    path.write_text(json.dumps(config))
    return copy
