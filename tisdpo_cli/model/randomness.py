"""Switches off everything random in a model's forward pass, and restores its configuration for saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tisdpo_cli.model.weights_check import all_configs

# Parts of configuration names of rates and sizes of noise: dropout, layerdrop, drop_path_rate, router_jitter_noise.
_RANDOM = ("drop", "jitter", "noise", "stochastic")

# The number of a configuration among all nested ones, a name in it, and the rate there before it was set to zero.
Rates = list[tuple[int, str, float]]


def disable_randomness(config: Any) -> Rates:
    """Set every rate of dropout and every size of noise to zero, also in nested configurations.

    Returns:
        The previous values.
    """
    rates = [
        (number, name, value)
        for number, part in enumerate(all_configs(config))
        for name, value in vars(part).items()
        if any(word in name for word in _RANDOM) and isinstance(value, float) and value > 0
    ]
    _set(config, [(number, name, 0.0) for number, name, _ in rates])
    return rates


def _set(config: Any, rates: Rates) -> None:
    parts = all_configs(config)
    for number, name, value in rates:
        setattr(parts[number], name, value)


def disable_dropout_modules(model: nn.Module) -> None:
    """Set the rate of dropout modules to zero, whatever their model's code took it from."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


@contextmanager
def original_rates(config: Any, rates: Rates) -> Iterator[None]:
    """Within this context, a configuration has the rates that `disable_randomness` found."""
    _set(config, rates)
    try:
        yield
    finally:
        _set(config, [(number, name, 0.0) for number, name, _ in rates])
