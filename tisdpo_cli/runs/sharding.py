"""Whether a training splits its model over the processes: asked for by an option, or by accelerate's launcher."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tisdpo_cli.runs.launch_checks import asked_for


@dataclass(frozen=True)
class Sharding:
    """How a model is split over the processes.

    Attributes:
        offload: whether shards stay in CPU memory while they are not in use.
        checkpointing: whether activations are to be recomputed, whatever the settings say.
    """

    offload: bool = False
    checkpointing: bool = False


def requested_sharding(shard: str, offload: bool) -> Sharding | None:
    """The sharding that options ask for, or accelerate's launcher by its configuration.

    Args:
        shard: `auto`, `none` or `full`; `auto` leaves it to the launcher.
        offload: whether the options ask for shards in CPU memory.
    """
    launched = asked_for("ACCELERATE_USE_FSDP")
    if shard == "none" or (shard == "auto" and not launched):
        return None
    return Sharding(
        offload=offload or (launched and asked_for("FSDP_OFFLOAD_PARAMS")),
        checkpointing=launched and asked_for("FSDP_ACTIVATION_CHECKPOINTING"),
    )


@contextmanager
def without_accelerates_fsdp() -> Iterator[None]:
    """Within this context, accelerate does not see that it was configured for FSDP: models are split here, not there.

    From then on transformers does not either: it would load a model without its weights on all processes but the first.
    """
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_FSDP"] = asked
