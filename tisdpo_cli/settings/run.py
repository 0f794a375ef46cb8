"""Settings of `run`: its own, and those of every stage."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from tisdpo_cli.settings.base import (
    Command,
    dry_run_setting,
    model_setting,
    num_processes_setting,
    output_setting,
    overwrite_setting,
    pairs_setting,
    seed_setting,
)
from tisdpo_cli.settings.datasets import DatasetValue
from tisdpo_cli.settings.estimate import Estimate
from tisdpo_cli.settings.fields import PathText, PositiveInt, Seed, setting
from tisdpo_cli.settings.groups import Dtype
from tisdpo_cli.settings.inspect_weights import InspectWeights
from tisdpo_cli.settings.train_pairs import Train, TrainDpo, TrainReverse
from tisdpo_cli.settings.train_sft import TrainSft


class Stages(Command):
    """The settings of `run` that belong to no stage."""

    command: ClassVar[str] = "run"

    model: PathText | None = model_setting(
        "starting model (default: a new one, from the train_sft section)", "-m", "--model-name-or-path", default=None
    )
    dataset: DatasetValue = pairs_setting()
    method: Literal["dpo", "sft", "prompt"] = setting(
        "dpo",
        "contrastive models: forward and reverse DPO, SFT on chosen and on rejected, or one model with two prompts",
        "Stages",
        shapes_result=False,
    )
    output_dir: PathText = output_setting()
    overwrite: bool = overwrite_setting("also redo changed stages that run did not make itself")
    num_processes: PositiveInt = num_processes_setting()
    dry_run: bool = dry_run_setting()


class Run(Stages):
    """Run the whole pipeline from one file: finished stages are skipped, an interrupted one is resumed."""

    max_steps: PositiveInt | None = setting(None, "number of optimizer steps of every training", "Stages")
    dtype: Dtype = setting("auto", "precision of every stage", "Stages")
    seed: Seed = seed_setting("random seed of every stage")
    train_sft: TrainSft | None = None
    train_dpo: TrainDpo | None = None
    train_reverse: TrainReverse | None = None
    sft_chosen: TrainSft | None = None
    sft_rejected: TrainSft | None = None
    estimate: Estimate
    train: Train
    inspect_weights: InspectWeights

    @model_validator(mode="after")
    def _has_scores(self) -> Run:
        if self.train.weights.weights_are == "final":
            raise ValueError("final weights need no contrastive models; train with them using `tisdpo train`")
        return self

    def stages(self) -> dict[str, Command]:
        """The stages that create an output, in order."""
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
