"""Frozen models for scoring and evaluation, in which adapters share their base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tisdpo_cli.model.adapters import adapters_of
from tisdpo_cli.model.directory import base_of, is_adapter, is_quantized_adapter
from tisdpo_cli.model.loading import load_model, move_to_device


class SharedModels:
    """Frozen models on a device, in which adapters of one base model share it.

    A scorer that is made right after `load` keeps to the adapter that was loaded; see `TokenScorer.adapter`.

    Args:
        device: where models are put.
        trust_remote_code: whether custom code from a model repository may run.
        paths: all that will be loaded: a base model is held in 4 bits if all adapters on it were trained so, since
            otherwise they would differ from it by its rounding.
    """

    def __init__(self, device: torch.device, trust_remote_code: bool, paths: Sequence[Path] = ()) -> None:
        self._device, self._trust_remote_code = device, trust_remote_code
        adapters = [path for path in paths if is_adapter(path)]
        bases = {base_of(path).resolve() for path in adapters}
        plain = {base_of(path).resolve() for path in adapters if not is_quantized_adapter(path)}
        self._in_4_bits = bases - plain
        self._bases: dict[tuple[Path, bool], nn.Module] = {}

    def load(self, path: Path, keep: bool = True) -> nn.Module:
        """Load a model or an adapter, whose adapter (or none) is then active.

        Args:
            path: its directory.
            keep: whether others may be put on its base model later.
        """
        base = base_of(path)
        quantized = is_quantized_adapter(path) or (base == path and path.resolve() in self._in_4_bits)
        key = base.resolve(), quantized
        shared = self._bases.get(key)
        if shared is None:
            model = load_model(path, self._trust_remote_code, trained=False, quantized=quantized)
            model = move_to_device(model, self._device).requires_grad_(False)
            if keep:
                self._bases[key] = model
            return model
        if base != path:
            return load_model(path, onto=shared, trained=False).to(self._device)
        adapters = adapters_of(shared)
        if adapters is not None:
            adapters.switch(None)
        return shared
