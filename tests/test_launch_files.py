"""The files of examples/launch: launchers accept them, and they start this program."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tisdpo_cli

FOLDER = Path(__file__).parents[1] / "examples" / "launch"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SCRIPT = FOLDER / "slurm.sh"


def test_the_files_are_known() -> None:
    names = ["ddp-nodes.yaml", "ddp.yaml", "fsdp2-nodes.yaml", "fsdp2.yaml", "slurm.sh"]
    assert sorted(path.name for path in FOLDER.iterdir()) == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_loads_its_configuration(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(path))
    sharded, several = path.name.startswith("fsdp2"), path.stem.endswith("-nodes")
    assert config.distributed_type == (DistributedType.FSDP if sharded else DistributedType.MULTI_GPU)
    assert config.fsdp_config.get("fsdp_version") == (2 if sharded else None)
    assert (config.num_machines, config.num_processes) == ((2, 16) if several else (1, 8))
    assert (config.mixed_precision, config.use_cpu) == ("no", False)
    assert (config.main_process_ip is not None) == several


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_its_command_starts_the_program_with_what_it_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher of accelerate puts together the processes that it would start."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.chdir(FOLDER.parents[1])
    (line,) = re.findall(r"^#   accelerate launch (.*)$", path.read_text(encoding="utf-8"), re.M)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(shlex.split(line)))
    assert (args.module, args.training_script) == (True, "tisdpo_cli")
    assert args.training_script_args == ["run", "--config", "FILE"]
    assert args.config_file == str(path.relative_to(FOLDER.parents[1]))
    variables = prepare_multi_gpu_env(args)
    assert (args.nproc_per_node, str(getattr(args, "nnodes", None))) == ("8", "2" if "-nodes" in path.stem else "None")
    sharded = path.name.startswith("fsdp2")
    assert (variables.get("ACCELERATE_USE_FSDP"), variables.get("FSDP_VERSION")) == (
        ("true", "2") if sharded else (None, None)
    )


def run_script(tmp_path: Path, programs: dict[str, str], *arguments: str, **variables: str):
    """Run the Slurm script with stand-ins for programs of Slurm."""
    for name, script in {"scontrol": "printf 'node7\\nnode8\\n'", **programs}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "42", **variables}
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True, text=True, env={**os.environ, "PATH": path, **job}, timeout=120, check=False,
    )  # fmt: skip


def test_the_slurm_script_is_one_for_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_the_slurm_script_starts_one_launcher_for_each_node(tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    show = 'printf "%s\\n" "$OMP_NUM_THREADS" "$@"'
    done = run_script(
        tmp_path, {"srun": show}, "run", "--config", "my file.yaml",
        SLURM_NNODES="2", SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="34",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    threads, program, *words = done.stdout.splitlines()
    assert (threads, program) == ("8", "torchrun")
    args = get_args_parser().parse_args(words)
    assert (args.nnodes, args.nproc_per_node, args.rdzv_id) == ("2", "4", "42")
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", "node7:29500")
    assert (args.module, args.training_script) == (True, "tisdpo_cli")
    assert args.training_script_args == ["run", "--config", "my file.yaml"]


@pytest.mark.slow
def test_the_slurm_script_trains(world: Path, tmp_path: Path) -> None:
    """On one node that is this machine, with CPUs in the place of GPUs."""
    out = tmp_path / "out"
    done = run_script(
        tmp_path, {"srun": 'exec "$@"', "scontrol": "echo localhost"},
        "train-dpo", "-m", str(world / "sft"), "-d", str(world / "data"), "-o", str(out), "--max-steps", "2",
        SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2", SLURM_CPUS_PER_TASK="2", ACCELERATE_USE_CPU="1", PORT="0",
        PYTHONPATH=str(Path(tisdpo_cli.__file__).parents[1]),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert "on each of 2 processes" in done.stderr
