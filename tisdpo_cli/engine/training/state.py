"""The state of a training: trained tensors and those of the optimizer, whole or split over the processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.engine.training.best import BestEvaluation
from tisdpo_cli.errors import UsageError
from tisdpo_cli.model.sharding import is_sharded, local, rows_of, split_like, whole
from tisdpo_cli.runs.checkpoints import (
    Checkpoint,
    Shard,
    discard_after,
    newest_checkpoint,
    open_checkpoint,
    save_checkpoint,
    save_shards,
)
from tisdpo_cli.runs.markers import differences
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.saved_tensors import SavedTensors, saved_tensors

# Where the manifest of a checkpoint holds the best evaluation.
EVALUATION = "evaluation"


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go, how often, and which one to resume from."""

    directory: Path
    every: int | None
    keep: int
    resume: str
    created_by: Mapping[str, Any] = field(default_factory=dict)


def find_checkpoint(config: CheckpointConfig, updates: int, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to resume from, if there is one; later ones of the run are removed.

    Args:
        config: which one.
        updates: number of updates of the run.
        warn: called for each checkpoint that cannot be used.

    Raises:
        UsageError: the one that is named is damaged, or was created with other settings.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return newest_checkpoint(config.directory, warn, updates)
    checkpoint = open_checkpoint(Path(config.resume).expanduser())
    changed = differences(checkpoint.state, config.created_by)
    if changed:
        raise UsageError(f"created with different settings: {'; '.join(changed)}", where=f"--resume {config.resume}")
    if checkpoint.path.parent.resolve() == config.directory.resolve():
        discard_after(config.directory, checkpoint.step)
    return checkpoint


def save_state(
    runtime: Runtime,
    config: CheckpointConfig,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: BestEvaluation,
) -> None:
    """Write a checkpoint; every process must take part.

    Args:
        runtime: this process.
        config: where it goes.
        step: number of updates done.
        model: to save.
        optimizer: to save.
        best: the best evaluation so far, whose checkpoint is kept if it is needed.

    Raises:
        TrainingError: it cannot be written.
    """
    tensors = {"model": model_tensors(model), "optimizer": optimizer_tensors(optimizer)}
    evaluation = best.state()
    state = {**config.created_by, **({EVALUATION: evaluation} if evaluation else {})}
    directory, keep, spared = config.directory, config.keep, best.step if best.loads else None
    if runtime.sharding is None:
        runtime.on_main(lambda: save_checkpoint(directory, step, tensors, state, keep, spared))
        return
    shards = {name: _shard(values, runtime.main) for name, values in tensors.items()}
    save_shards(runtime, directory, step, shards, state, keep, spared)


def _shard(tensors: Mapping[str, Tensor], main: bool) -> Shard:
    """What this process writes: its rows of what is split, and on the first process all that is not."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if is_sharded(tensor)}
    return Shard({name: local(tensor.detach()) for name, tensor in tensors.items() if main or name in shapes}, shapes)


def restore_state(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Load a checkpoint, of a run on any number of processes, sharded or not; without an optimizer the model alone."""
    with saved_tensors(checkpoint, "model") as saved:
        for name, tensor in model_tensors(model).items():
            local(tensor.detach()).copy_(_rows(saved, name, tensor))
    if optimizer is None:
        return
    with saved_tensors(checkpoint, "optimizer") as saved:
        _restore_optimizer(optimizer, saved)


def _rows(saved: SavedTensors, name: str, like: Tensor) -> Tensor:
    rows = rows_of(like)
    return saved.read(name) if rows is None else saved.read(name, rows.start, rows.stop)


def whole_tensors(runtime: Runtime, model: nn.Module) -> dict[str, Tensor] | None:
    """All tensors of a sharded model in the memory of the first process, or None if it is not sharded or on another
    process. Every process must take part.
    """
    if runtime.sharding is None:
        return None
    kept: dict[str, Tensor] = {}
    for name, tensor in model_tensors(model).items():
        gathered = whole(tensor.detach())
        if runtime.main:
            kept[name] = gathered.cpu()
    return kept if runtime.main else None


def all_finite(runtime: Runtime, model: nn.Module) -> bool:
    """Whether all trained weights are finite; every process must ask."""
    mine = (local(p.detach()) for p in model.parameters() if p.requires_grad)
    bad = sum(not bool(torch.isfinite(values).all()) for values in mine)
    return int(runtime.total(torch.tensor([bad], device=runtime.device))) == 0


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, each tied one once; of a model with frozen parameters, the trained ones."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(trained) < len(dict(model.named_parameters())):
        return dict(trained)
    saved = model.state_dict()
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as `index.name` to tensor; counts are tensors of int64."""
    state: Any = optimizer.state
    return {
        # A file holds no tensor twice: all parameters share the tables of an optimizer in 8 bits.
        f"{index}.{name}": value.clone() if isinstance(value, Tensor) else torch.tensor(value)
        for index, parameter in enumerate(_parameters(optimizer))
        for name, value in state.get(parameter, {}).items()
        if value is not None
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: SavedTensors) -> None:
    """Load a state from `optimizer_tensors` into an optimizer with the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    parameters = _parameters(optimizer)
    for key in saved.names:
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        # What has the shape of its parameter is split like it.
        if is_sharded(parameter) and saved.shape(key) == tuple(parameter.shape):
            value: Any = split_like(_rows(saved, key, parameter), parameter)
        else:
            tensor = saved.read(key)
            value = int(tensor) if tensor.dtype == torch.int64 and not tensor.ndim else tensor
        state.setdefault(int(index), {})[name] = value
    if type(optimizer).__module__.startswith("torch."):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return
    # bitsandbytes would cast states in 8 bits to the dtype of the parameters.
    for number, parameter in enumerate(parameters):
        for name, value in state.get(number, {}).items():
            on_device = value.to(parameter.device) if isinstance(value, Tensor) else value
            optimizer.state[parameter][name] = on_device


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
