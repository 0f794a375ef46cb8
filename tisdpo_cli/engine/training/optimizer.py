"""Optimizers: how they are made, and their state as tensors for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tisdpo_cli.model.quantization import bitsandbytes

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "rmsprop": torch.optim.RMSprop,
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adamw8bit": lambda *args, **kwargs: bitsandbytes().optim.AdamW8bit(*args, **kwargs),
    "paged_adamw8bit": lambda *args, **kwargs: bitsandbytes().optim.PagedAdamW8bit(*args, **kwargs),
}
# Those of torch that update in fused kernels on GPUs.
_FUSED = ("adamw", "adam", "sgd")


@dataclass(frozen=True)
class Schedule:
    """Optimizer and learning-rate schedule."""

    optimizer: str
    learning_rate: float
    lr_scheduler: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float


def make_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """The optimizer of all trained parameters of a model on its device."""
    # Fused: fewest kernels on a GPU. On a CPU it saves 2 % of an update and changes the last bits.
    on_gpu = next(model.parameters()).device.type == "cuda"
    fused = {"fused": True} if on_gpu and schedule.optimizer in _FUSED else {}
    return OPTIMIZERS[schedule.optimizer](
        [p for p in model.parameters() if p.requires_grad],
        lr=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        **fused,
    )


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


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load a state from `optimizer_tensors` into an optimizer with the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        counts = tensor.dtype == torch.int64 and not tensor.ndim
        state.setdefault(int(index), {})[name] = int(tensor) if counts else tensor
    if type(optimizer).__module__.startswith("torch."):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return
    # bitsandbytes would cast states in 8 bits to the dtype of the parameters.
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in state.get(number, {}).items():
            on_device = value.to(parameter.device) if isinstance(value, Tensor) else value
            optimizer.state[parameter][name] = on_device


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
