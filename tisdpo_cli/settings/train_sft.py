"""Settings of `train-sft`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from tisdpo_cli.settings.base import (
    MODEL,
    Command,
    dry_run_setting,
    output_setting,
    overwrite_setting,
    path_input,
    profile_setting,
    remote_code_setting,
    seed_setting,
)
from tisdpo_cli.settings.fields import PathText, PositiveInt, Seed, setting
from tisdpo_cli.settings.groups import (
    Checkpoints,
    Evaluation,
    Memory,
    SftData,
    SftOptim,
)


class TrainSft(Command):
    """Train a starting model by supervised fine-tuning, or make one from the data with --init."""

    command: ClassVar[str] = "train-sft"

    model: PathText | None = path_input("model to train: directory or hub id (or --init)", MODEL, "-m", default=None)
    init: bool = setting(False, "make a small tokenizer and model from the dataset itself", MODEL)
    vocab_size: PositiveInt = setting(2048, "tokens of the new tokenizer, with --init", MODEL)
    hidden_size: PositiveInt = setting(192, "width of the new model, with --init", MODEL)
    layers: PositiveInt = setting(4, "depth of the new model, with --init", MODEL)
    heads: PositiveInt = setting(6, "attention heads of the new model, with --init", MODEL)
    trust_remote_code: bool = remote_code_setting()
    dataset: PathText = path_input(
        "pairs, or instruction rows: file (JSONL, JSON, CSV, Parquet) or directory", "Data", "-d", "--dataset-name"
    )
    target: Literal["chosen", "rejected", "both"] = setting("chosen", "which responses of pairs to learn", "Data")
    train_on_prompt: bool = setting(False, "learn the prompt tokens too", "Data")
    output_dir: PathText = output_setting()
    seed: Seed = seed_setting()
    data: SftData = SftData()
    optim: SftOptim = SftOptim()
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    profile: PathText | None = profile_setting()
    overwrite: bool = overwrite_setting()
    dry_run: bool = dry_run_setting()

    @classmethod
    def new_model_shape(cls) -> dict[str, int]:
        """The settings that shape a new model, with their defaults."""
        return {name: cls.model_fields[name].default for name in ("vocab_size", "hidden_size", "layers", "heads")}

    @model_validator(mode="after")
    def _one_start(self) -> TrainSft:
        if self.init == (self.model is not None):
            raise ValueError("give either --model PATH or --init")
        if not self.init:
            idle = [name for name, default in self.new_model_shape().items() if getattr(self, name) != default]
            if idle:
                raise ValueError(f"{', '.join(idle)} shape a new model and need --init")
        elif self.vocab_size < 258:
            raise ValueError("vocab_size must be at least 258: 256 bytes, end-of-sequence and padding")
        elif self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of 2 · heads ({self.heads})")
        return self

    def learning_rate(self) -> float:
        """The learning rate in force: 2e-5, or 3e-3 for a new model, unless one is given."""
        given = self.optim.learning_rate
        return given if given is not None else (3e-3 if self.init else 2e-5)
