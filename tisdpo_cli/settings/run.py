"""Settings of `run`: its own, and those of every stage."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from tisdpo_cli.settings.base import MODEL, RUNTIME, Command, output_setting, path_input
from tisdpo_cli.settings.estimate import Estimate
from tisdpo_cli.settings.fields import PathText, PositiveInt, Seed, setting
from tisdpo_cli.settings.groups import Dtype
from tisdpo_cli.settings.inspect_weights import InspectWeights
from tisdpo_cli.settings.train_pairs import Train, TrainDpo, TrainReverse
from tisdpo_cli.settings.train_sft import TrainSft


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

    command: ClassVar[str] = "run"

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
