"""Settings of `train-sft`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from tisdpo_cli.formats import FORMAT_NAMES
from tisdpo_cli.settings.adapter import Adapter
from tisdpo_cli.settings.base import (
    Command,
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
from tisdpo_cli.settings.groups import Checkpoints, Hub, Memory, SftData
from tisdpo_cli.settings.optimization import SftOptim
from tisdpo_cli.settings.watching import Evaluation, Tracking


class TrainSft(Command):
    """Fine-tune a starting model on responses (SFT), or create a small one from the dataset with --init."""

    command: ClassVar[str] = "train-sft"

    model: PathText | None = model_setting(
        "model to train: directory or hub id (or --init)", "-m", "--model-name-or-path", default=None
    )
    init: bool = setting(False, "create a small tokenizer and model from the dataset", "Model")
    vocab_size: PositiveInt = setting(2048, "vocabulary size of the new tokenizer, with --init", "Model")
    hidden_size: PositiveInt = setting(192, "hidden size of the new model, with --init", "Model")
    layers: PositiveInt = setting(4, "number of layers of the new model, with --init", "Model")
    heads: PositiveInt = setting(6, "number of attention heads of the new model, with --init", "Model")
    trust_remote_code: bool = remote_code_setting()
    dataset: DatasetValue = pairs_setting(
        f"preference pairs or instruction rows: {FORMAT_NAMES} file, directory, or hub id"
    )
    target: Literal["chosen", "rejected", "both"] = setting("chosen", "responses of pairs to train on", "Data")
    train_on_prompt: bool = setting(False, "train on the prompt tokens too", "Data")
    data: SftData = SftData()
    adapter: Adapter = Adapter()
    optim: SftOptim = SftOptim()
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    output_dir: PathText = output_setting()
    overwrite: bool = overwrite_setting()
    checkpoints: Checkpoints = Checkpoints()
    hub: Hub = Hub()
    tracking: Tracking = Tracking()
    seed: Seed = seed_setting()
    num_processes: PositiveInt = num_processes_setting()
    profile: PathText | None = profile_setting()
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
        elif self.adapter.lora_r is not None:
            raise ValueError("lora_r needs a trained model, not --init")
        elif self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of 2 · heads ({self.heads})")
        return self

    @model_validator(mode="after")
    def _schedule_fits_the_rate(self) -> TrainSft:
        self.optim.schedule_params(self.learning_rate())
        return self

    def learning_rate(self) -> float:
        """The learning rate in force: the given one, or 2e-5, or 3e-3 for a new model."""
        given = self.optim.learning_rate
        return given if given is not None else (3e-3 if self.init else 2e-5)
