"""Settings of `train-dpo`, `train-reverse` and `train`, which differ in two values."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from tisdpo_cli.settings.base import (
    MODEL,
    RUNTIME,
    Command,
    dry_run_setting,
    output_setting,
    overwrite_setting,
    path_input,
    profile_setting,
    remote_code_setting,
    seed_setting,
)
from tisdpo_cli.settings.fields import PathText, Seed, setting
from tisdpo_cli.settings.groups import (
    Checkpoints,
    Data,
    Evaluation,
    Memory,
    Method,
    Optim,
    Weights,
)


class TrainPairs(Command):
    """What train-dpo, train-reverse and train have in common."""

    model: PathText = path_input("model to train: directory or hub id", MODEL, "-m", "--model-name-or-path")
    ref_model: PathText | None = path_input("reference (the model itself as it starts)", MODEL, default=None)
    trust_remote_code: bool = remote_code_setting()
    dataset: PathText = path_input(
        "preference pairs: file (JSONL, JSON, CSV, Parquet), directory or hub id", "Data", "-d", "--dataset-name"
    )
    output_dir: PathText = output_setting()
    seed: Seed = seed_setting()
    data: Data = Data()
    method: Method = Method()
    optim: Optim = Optim()
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    cache_dir: PathText | None = setting(
        None,
        "where the reference's log-probs are kept for the next training (~/.cache/tisdpo)",
        RUNTIME,
        shapes_result=False,
        metavar="PATH",
    )
    no_ref_cache: bool = setting(False, "neither read nor keep the reference's log-probs", RUNTIME, shapes_result=False)
    profile: PathText | None = profile_setting()
    overwrite: bool = overwrite_setting()
    dry_run: bool = dry_run_setting()


class TrainDpo(TrainPairs):
    """Train the forward contrastive model π⁺: DPO on the pairs as they are."""

    command: ClassVar[str] = "train-dpo"


class TrainReverse(TrainPairs):
    """Train the reverse contrastive model π⁻: DPO with chosen and rejected swapped."""

    command: ClassVar[str] = "train-reverse"


class Train(TrainPairs):
    """Train with the token-weighted DPO loss on a scored dataset: TIS-DPO itself."""

    command: ClassVar[str] = "train"

    dataset: PathText = path_input("scored dataset, from `tisdpo estimate`", "Data", "-d", "--dataset-name")
    weights: Weights = Weights()

    @model_validator(mode="after")
    def _loss_takes_weights(self) -> Train:
        if not self.method.objective().objective.takes_weights:
            raise ValueError(f"loss {self.method.loss} takes no token weights; train it with train-dpo")
        return self
