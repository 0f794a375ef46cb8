"""Launches that would do something else than what was asked for, found in what launchers leave in the environment."""

from __future__ import annotations

import os

from tisdpo_cli.errors import TrainingError

_TO_FSDP2 = "use FSDP2: distributed_type: FSDP and, under fsdp_config, fsdp_version: 2 in the file of accelerate launch"


def asked_for(variable: str) -> bool:
    """Whether a launcher has switched something on."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def check_request() -> None:
    """Refuse kinds of sharding that there are not, before accelerate starts what it can of them.

    Raises:
        TrainingError: DeepSpeed or FSDP version 1 was asked for.
    """
    if asked_for("ACCELERATE_USE_DEEPSPEED"):
        raise TrainingError("DeepSpeed is not supported", fix=_TO_FSDP2)
    if asked_for("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise TrainingError("FSDP version 1 is not supported", fix=_TO_FSDP2)


def check_processes(world: int) -> None:
    """Refuse a run of fewer processes than asked for.

    Args:
        world: number of processes in this run.

    Raises:
        TrainingError: there were to be more.
    """
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != world:
        raise TrainingError(
            f"launched for {wanted} processes but running as {world}",
            fix="use --num-processes N, or accelerate launch --multi_gpu",
        )
    # `accelerate launch` of one process sets MASTER_ADDR only if it was asked for more, but no WORLD_SIZE.
    by_accelerate = "ACCELERATE_DYNAMO_MODE" in os.environ and "MASTER_ADDR" in os.environ
    if world == 1 and by_accelerate and "WORLD_SIZE" not in os.environ:
        raise TrainingError(
            "accelerate launch was asked for several processes but started one, as it does on CPUs (MULTI_CPU)",
            fix="use --num-processes N, or accelerate launch --multi_gpu (unset MASTER_ADDR if one is right)",
        )
