"""Optimizers and their schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from tisdpo_cli.method.params import Value
from tisdpo_cli.method.schedules import learning_rate
from tisdpo_cli.model.quantization import bitsandbytes

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "rmsprop": torch.optim.RMSprop,
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adafactor": lambda *args, **kwargs: _adafactor()(*args, scale_parameter=False, relative_step=False, **kwargs),
    "adagrad": torch.optim.Adagrad,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamw8bit": lambda *args, **kwargs: bitsandbytes().optim.AdamW8bit(*args, **kwargs),
    "paged_adamw8bit": lambda *args, **kwargs: bitsandbytes().optim.PagedAdamW8bit(*args, **kwargs),
}
# Those of torch that update in fused kernels on GPUs.
_FUSED = ("adamw", "adam", "sgd")


@dataclass(frozen=True)
class Schedule:
    """Optimizer and learning-rate schedule.

    Attributes:
        warmup_steps: their number, or below 1 their share of all steps.
        lr_scheduler_params: resolved parameters of the schedule.
        optimizer_params: given parameters of the optimizer: `adam_beta1`, `adam_beta2`, `adam_epsilon`, `momentum`.
        without_decay: kinds of parameters without weight decay: `norm`, `bias`.
    """

    optimizer: str
    learning_rate: float
    lr_scheduler: str
    warmup_steps: float
    weight_decay: float
    max_grad_norm: float
    lr_scheduler_params: Mapping[str, Value] = field(default_factory=dict)
    optimizer_params: Mapping[str, float] = field(default_factory=dict)
    without_decay: Sequence[str] = ()

    @property
    def has_momentum(self) -> bool:
        """Whether there is momentum where it can be switched off."""
        return bool(self.optimizer_params.get("momentum"))

    def rate(self, step: int, updates: int) -> float:
        """The learning rate of an update (0 is the first) of so many."""
        return learning_rate(
            step, self.learning_rate, self.warmup(updates), updates, self.lr_scheduler, self.lr_scheduler_params
        )

    def warmup(self, updates: int) -> int:
        """The number of warm-up steps of a training with so many; a share is rounded up."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        # 7 % of 100 are 7, which a product of floats exceeds.
        return math.ceil(Fraction(str(self.warmup_steps)) * updates)


def make_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """The optimizer of all trained parameters of a model on its device."""
    # Fused: fewest kernels on a GPU. On a CPU it saves 2 % of an update and changes the last bits.
    on_gpu = next(model.parameters()).device.type == "cuda"
    fused = {"fused": True} if on_gpu and schedule.optimizer in _FUSED else {}
    return OPTIMIZERS[schedule.optimizer](
        _groups(model, schedule.without_decay),
        lr=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        **_arguments(schedule.optimizer_params),
        **fused,
    )


def _groups(model: nn.Module, without_decay: Sequence[str]) -> list[Any]:
    """The trained parameters, in two groups where some have no weight decay."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not without_decay:
        return [parameter for _, parameter in trained]
    spared = _names_without_decay(model, without_decay)
    decayed = [parameter for name, parameter in trained if name not in spared]
    others = [parameter for name, parameter in trained if name in spared]
    return [group for group in ({"params": decayed}, {"params": others, "weight_decay": 0.0}) if group["params"]]


def _names_without_decay(model: nn.Module, kinds: Sequence[str]) -> set[str]:
    """Names of the biases, and of the parameters of norms, which models call so in a class or in an attribute."""
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    spared = set()
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        of_norm = owner in norms or "norm" in owner.rpartition(".")[2].lower()
        if ("bias" in kinds and leaf == "bias") or ("norm" in kinds and of_norm):
            spared.add(name)
    return spared


def _arguments(params: Mapping[str, float]) -> dict[str, Any]:
    """Parameters as arguments of the optimizers; what is not given is left to them."""
    arguments: dict[str, Any] = {}
    if "adam_beta1" in params or "adam_beta2" in params:
        arguments["betas"] = (params.get("adam_beta1", 0.9), params.get("adam_beta2", 0.999))
    if "adam_epsilon" in params:
        arguments["eps"] = params["adam_epsilon"]
    if "momentum" in params:
        arguments["momentum"] = params["momentum"]
    return arguments


def _adafactor() -> Callable[..., torch.optim.Optimizer]:
    """Transformers', which takes the learning rate as it is; torch's scales it by the size of each parameter."""
    from transformers.optimization import Adafactor

    return Adafactor
