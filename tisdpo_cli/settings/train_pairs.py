"""Settings of `train-dpo`, `train-reverse` and `train`, which differ in two values."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from tisdpo_cli.settings.adapter import Adapter
from tisdpo_cli.settings.base import (
    Command,
    dataset_setting,
    dry_run_setting,
    model_setting,
    num_processes_setting,
    output_setting,
    overwrite_setting,
    pairs_setting,
    profile_setting,
    remote_code_setting,
    seed_setting,
)
from tisdpo_cli.settings.datasets import DatasetValue
from tisdpo_cli.settings.fields import PathText, PositiveInt, Seed, setting
from tisdpo_cli.settings.groups import Checkpoints, Hub, Memory, TrainingData
from tisdpo_cli.settings.method_groups import Method, Weights
from tisdpo_cli.settings.optimization import Optim
from tisdpo_cli.settings.watching import Evaluation, Tracking


class TrainPairs(Command):
    """What train-dpo, train-reverse and train have in common."""

    model: PathText = model_setting("model to train: directory or hub id", "-m", "--model-name-or-path")
    ref_model: PathText | None = model_setting(
        "reference model (default: the initial --model)", default=None, repeated=True
    )
    trust_remote_code: bool = remote_code_setting()
    dataset: DatasetValue = pairs_setting()
    data: TrainingData = TrainingData()
    method: Method = Method()
    adapter: Adapter = Adapter()
    optim: Optim = Optim()
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    output_dir: PathText = output_setting()
    overwrite: bool = overwrite_setting()
    checkpoints: Checkpoints = Checkpoints()
    hub: Hub = Hub()
    tracking: Tracking = Tracking()
    seed: Seed = seed_setting()
    num_processes: PositiveInt = num_processes_setting()
    cache_dir: PathText | None = setting(
        None, "cache directory for tokenized datasets and reference log-probs (default: ~/.cache/tisdpo)", "Run",
        shapes_result=False, metavar="DIR",
    )  # fmt: skip
    no_ref_cache: bool = setting(False, "do not cache reference log-probs", "Run", shapes_result=False)
    profile: PathText | None = profile_setting()
    dry_run: bool = dry_run_setting()


class TrainDpo(TrainPairs):
    """Train the forward contrastive model π⁺: DPO on the preference pairs."""

    command: ClassVar[str] = "train-dpo"


class TrainReverse(TrainPairs):
    """Train the reverse contrastive model π⁻: DPO with chosen and rejected swapped."""

    command: ClassVar[str] = "train-reverse"


class Train(TrainPairs):
    """Train with TIS-DPO: the token-weighted DPO loss on a scored dataset."""

    command: ClassVar[str] = "train"

    dataset: DatasetValue = dataset_setting("scored dataset, from `tisdpo estimate`", "-d", "--dataset-name", many=True)
    weights: Weights = Weights()

    @model_validator(mode="after")
    def _reads_one_dataset(self) -> Train:
        if not isinstance(self.dataset, str):
            raise ValueError("train reads one scored dataset; give the mixture to estimate")
        return self

    @model_validator(mode="after")
    def _loss_takes_weights(self) -> Train:
        if not self.method.objective().objective.takes_weights:
            raise ValueError(f"loss {self.method.loss} takes no token weights; use train-dpo")
        return self
