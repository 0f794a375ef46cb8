"""Computes with a model in float32 whose weights have lower precision. Pure torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from tisdpo_cli.model.quantization import computing_in_float32


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within this context, a model with weights in bf16 computes in float32, in which layouts can be told apart.

    One part at a time is converted, so that the whole model never needs the memory of float32.
    """
    hooks = []
    quantized = computing_in_float32(model)
    # An adapter on experts reads the weights of its whole subtree before any module in it runs.
    wrappers = [m for m in model.modules() if type(m).__name__ == "ParamWrapper"]
    inner = {m for wrapper in wrappers for m in wrapper.modules() if m is not wrapper}
    for module in model.modules():
        if module in inner:
            continue
        own = module.parameters(recurse=module in wrappers)
        low = [p for p in own if p.is_floating_point() and p.dtype != torch.float32]
        if low:
            kept = {parameter: parameter.data for parameter in low}
            hooks.append(module.register_forward_pre_hook(partial(_convert, kept)))
            hooks.append(module.register_forward_hook(partial(_restore, kept), always_call=True))
    try:
        with quantized:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _convert(kept: Mapping[nn.Parameter, Tensor], *_: object) -> None:
    for parameter, data in kept.items():
        parameter.data = data.float()


def _restore(kept: Mapping[nn.Parameter, Tensor], *_: object) -> None:
    for parameter, data in kept.items():
        parameter.data = data
