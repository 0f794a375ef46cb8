"""What a dry run found, as plain values, and what it knows of models whose weights it does not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tisdpo_cli.engine.training.planning import Prediction
from tisdpo_cli.model.directory import base_of, is_adapter, is_quantized_adapter
from tisdpo_cli.model.shapes import ModelShape, file_bytes, measure, outline
from tisdpo_cli.runs.machine import device_memory, resident_memory
from tisdpo_cli.runs.runtime import Runtime

if TYPE_CHECKING:
    from tisdpo_cli.engine.training.first_row import FirstRow

# What else is in memory: on a CPU what a backward pass and threads need; on a GPU its driver, kernels and workspaces.
_CPU_EXTRA, _GPU_EXTRA = 40_000_000, 700_000_000
# A weight in 4 bits with its share of the scales, which are quantized too.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        config_yaml: the settings in force, as `config.yaml` would hold them.
        splits: split to its counts and lengths; see `TruncationStats.sizes`.
        first_row: the first row, token by token, or None where the command reads none.
        prediction: what the command will need.
        steps: number of updates, their size and the epochs that they make; empty where nothing is trained.
    """

    config_yaml: str
    splits: Mapping[str, Mapping[str, Any]]
    first_row: FirstRow | None
    prediction: Prediction
    steps: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the settings."""
        row = None if self.first_row is None else self.first_row.as_dict()
        prediction = self.prediction.as_dict()
        return {"splits": dict(self.splits), "first_row": row, "steps": dict(self.steps), "prediction": prediction}


def program_memory(runtime: Runtime) -> int:
    """Bytes of memory that the program itself takes on its device."""
    return _GPU_EXTRA if runtime.device.type == "cuda" else resident_memory() + _CPU_EXTRA


def memory_per_process(runtime: Runtime, processes: int) -> int:
    """Memory in bytes for each process of this machine; on CPUs they share it."""
    memory = device_memory(runtime.device)
    return memory if runtime.device.type == "cuda" else memory // max(1, processes)


@dataclass(frozen=True)
class FrozenModel:
    """A model that is not trained, without the values of its weights.

    Attributes:
        base: what it shares with the adapters of the same base model: its directory, and whether it is in 4 bits.
        base_bytes: of the weights of the base model in memory.
        own_bytes: of its adapter; 0 for a whole model.
        cache_bytes: of the keys and values of a token in all layers, in float32.
        file: size of the weight files of the base model.
    """

    shape: ModelShape
    base: tuple[Path, bool]
    base_bytes: float
    own_bytes: float
    cache_bytes: float
    file: int


def frozen_model(path: Path, trust_remote_code: bool) -> FrozenModel:
    """A model or adapter, whose files get all checks that need no values.

    Raises:
        ModelError: they are damaged.
    """
    model = outline(path, trust_remote_code)
    shape, low = measure(model), is_quantized_adapter(path)
    own = 4 * shape.trained if is_adapter(path) else 0
    base = 4 * shape.total - own
    if low:
        base -= round((4 - _NF4_BYTES) * shape.linear)
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_attention_heads", 1)
    kept = (getattr(config, "num_key_value_heads", None) or heads) / heads
    cache = 2 * 4 * shape.layers * shape.attention * kept
    return FrozenModel(shape, (base_of(path).resolve(), low), base, own, cache, file_bytes(base_of(path)))


def bytes_together(models: Iterable[FrozenModel]) -> float:
    """What the weights of some models take together; adapters share their base model."""
    every = list(models)
    bases = {model.base: model.base_bytes for model in every}
    return sum(bases.values()) + sum(model.own_bytes for model in every)


def loading_bytes(models: Sequence[FrozenModel], on_gpu: bool) -> int:
    """The weight file that a CPU holds mapped while it copies the weights of the last model."""
    return 0 if on_gpu else max((model.file for model in models), default=0)


def rounded(parts: Mapping[str, float]) -> dict[str, int]:
    """Parts in whole bytes, without empty ones."""
    return {name: round(value) for name, value in parts.items() if value}
