"""The registry of commands."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.estimate import Estimate
from tisdpo_cli.settings.evaluate import Evaluate
from tisdpo_cli.settings.fields import group_of
from tisdpo_cli.settings.inspect_weights import InspectWeights
from tisdpo_cli.settings.run import STAGES, Run
from tisdpo_cli.settings.train_pairs import Train, TrainDpo, TrainReverse
from tisdpo_cli.settings.train_sft import TrainSft

COMMANDS: dict[str, type[Command]] = {
    "train-dpo": TrainDpo,
    "train-reverse": TrainReverse,
    "estimate": Estimate,
    "train": Train,
    "inspect-weights": InspectWeights,
    "run": Run,
    "train-sft": TrainSft,
    "evaluate": Evaluate,
}


def leaf_paths(command: type[Command]) -> dict[str, FieldInfo]:
    """Every single setting of a command by dotted name (`optim.batch_size`)."""
    paths: dict[str, FieldInfo] = {}
    for name, info in command.model_fields.items():
        group = group_of(info)
        if group is None:
            if name not in STAGES:
                paths[name] = info
        else:
            paths.update({f"{name}.{inner}": field for inner, field in group.model_fields.items()})
    return paths
