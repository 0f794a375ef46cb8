"""The commands and their settings: the registry `COMMANDS` is what the CLI is built from; and those of `run`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from pydantic.fields import FieldInfo

from tisdpo_cli.settings.asking import Estimate, Evaluate, InspectWeights
from tisdpo_cli.settings.base import MODEL, RUNTIME, Command, output_setting, path_input
from tisdpo_cli.settings.fields import PathText, PositiveInt, Seed, group_of, setting
from tisdpo_cli.settings.groups import Dtype
from tisdpo_cli.settings.training import Train, TrainDpo, TrainReverse, TrainSft


class Stages(Command):
    """The settings of `run` that are no stage's own."""

    model: PathText | None = path_input("starting model (without a train_sft section)", MODEL, "-m", default=None)
    dataset: PathText = path_input(
        "preference pairs: file (JSONL, JSON, CSV, Parquet), directory or hub id", "Data", "-d"
    )
    output_dir: PathText = output_setting()
    method: Literal["dpo", "sft", "prompt"] = setting(
        "dpo",
        "contrastive models: forward and reverse DPO, SFT on chosen and on rejected, or one model with two prompts",
        "Stages",
        shapes_result=False,
    )
    overwrite: bool = setting(
        False, "make stages again whose settings or inputs have changed", RUNTIME, shapes_result=False
    )


class Run(Stages):
    """The whole pipeline from one file: finished stages are skipped, an interrupted one goes on."""

    max_steps: PositiveInt | None = setting(None, "updates of every training", "Stages")
    seed: Seed = setting(0, "seed of every stage", "Stages")
    dtype: Dtype = setting("auto", "precision of every stage", "Stages")
    train_sft: TrainSft | None = None
    train_dpo: TrainDpo | None = None
    train_reverse: TrainReverse | None = None
    sft_chosen: TrainSft | None = None
    sft_rejected: TrainSft | None = None
    estimate: Estimate
    train: Train
    inspect_weights: InspectWeights

    @model_validator(mode="after")
    def _makes_scores(self) -> Run:
        if self.train.weights.weights_are == "final":
            raise ValueError("final weights need no contrastive models: train with them by `tisdpo train` alone")
        return self

    def stages(self) -> dict[str, Command]:
        """The stages that make something, in order."""
        every = {name: getattr(self, name) for name in STAGES if name != "inspect_weights"}
        return {name: settings for name, settings in every.items() if settings is not None}


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

# The stages of `run`, in order, each with the settings of its command.
STAGES: dict[str, type[Command]] = {
    "train_sft": TrainSft,
    "train_dpo": TrainDpo,
    "train_reverse": TrainReverse,
    "sft_chosen": TrainSft,
    "sft_rejected": TrainSft,
    "estimate": Estimate,
    "train": Train,
    "inspect_weights": InspectWeights,
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
