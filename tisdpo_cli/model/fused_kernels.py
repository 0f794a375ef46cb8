"""Norms, rotary positions and activations in fewer kernels, by Liger (Hsu et al. 2024, arXiv 2410.10989).

The head is left to `head.py`, which needs the log-prob of each token and not a mean loss.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.errors import ModelError, UsageError

_OPTION, _MARK = "--liger-kernel", "_fused_by"
_DEVICES = ("cuda",)
# Positions of the probe, and by how much a log-prob may differ, in nats: rounding in another order.
_POSITIONS, _BOUND, _BOUNDS = 64, 1e-3, {torch.bfloat16: 0.25, torch.float16: 0.05}


def fuse_elementwise(model: nn.Module, device: torch.device) -> None:
    """Let Liger's kernels compute what the package knows of a model; a second time changes nothing.

    Args:
        model: of transformers, with or without an adapter; elsewhere if only a shard of it will be on the device.
        device: where the model computes.

    Raises:
        UsageError: the device is not a GPU, the package is missing, or it has no kernels for such a model.
        ModelError: the kernels change log-probs by more than rounding.
    """
    if fused_by(model) is not None:
        return
    liger = require_liger(device)
    base: Any = getattr(model, "get_base_model", lambda: model)()
    kind = base.config.model_type
    if kind not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UsageError(f"no Liger kernels for a model of type {kind}", where=_OPTION, fix=f"leave out {_OPTION}")
    before = _logps(base, device)
    liger._apply_liger_kernel_to_instance(model=base, cross_entropy=False, fused_linear_cross_entropy=False)
    _check(before, _logps(base, device), _BOUNDS.get(base.dtype, _BOUND))
    setattr(model, _MARK, f"liger-kernel {version('liger-kernel')}")


def fused_by(model: nn.Module) -> str | None:
    """Package and version of the kernels that a model was given; None for the model's own code."""
    return getattr(model, _MARK, None)


def require_liger(device: torch.device) -> Any:
    """The module of the package that changes models.

    Raises:
        UsageError: the device is not a GPU, or the package is missing.
    """
    if device.type not in _DEVICES:
        raise UsageError("Liger's kernels need a GPU", where=_OPTION, fix=f"leave out {_OPTION}")
    try:
        return import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise UsageError("needs the package liger-kernel", where=_OPTION, fix="pip install liger-kernel") from error


def _check(before: Tensor | None, after: Tensor | None, bound: float) -> None:
    if before is None or after is None:
        return
    difference = (after - before).abs().max().item()
    if not difference <= bound:
        raise ModelError(
            f"Liger's kernels change log-probs of the model by up to {difference:.1e} nats", fix=f"leave out {_OPTION}"
        )


def _logps(model: Any, device: torch.device) -> Tensor | None:
    """Log-probs [1, T, V] of a row of tokens, spread over the vocabulary; None for a model on another device."""
    if model.device.type != device.type:
        return None
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(_POSITIONS, device=model.device)[None] * 7919 % vocabulary
    with torch.no_grad():
        return model(ids).logits.float().log_softmax(-1)
