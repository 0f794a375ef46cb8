"""Accounts for every tensor of a model that was just loaded: missing, of another shape, not finite, or not used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tisdpo_cli.errors import ModelError
from tisdpo_cli.model.directory import tensor_names

# Tensors that no causal LM computes with: value heads of other trainers, and buffers that older versions
# of transformers saved.
_HARMLESS = (
    r"(^|\.)v_head\.",
    r"rotary_emb\.inv_freq$",
    r"(^|\.)masked_bias$",
    r"\.attn\.(attention\.)?bias$",
    r"\.attention\.bias$",
    r"(^|\.)position_ids$",
)
_NAMED = 3


def check_weights(model: nn.Module, info: Mapping[str, Any], path: Path) -> list[str]:
    """Check that the weight files and the model have the same tensors, and that all values that are there are finite.

    Args:
        model: as loaded.
        info: loading info of transformers.
        path: directory of the model.

    Returns:
        Notes on tensors of the files that the model does not use.

    Raises:
        ModelError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    _refuse_mismatched(info.get("mismatched_keys", ()), path)
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{len(missing)} tensors are missing from the weights, {missing[0]} first",
            where=str(path),
            fix="copy the model again; loading it would fill them with random values",
        )
    harmless = _harmless_pattern(model)
    unexpected = sorted(name for name in info.get("unexpected_keys", ()) if not harmless.search(name))
    if unexpected:
        raise ModelError(
            f"{len(unexpected)} tensors of the weights are not in the model of config.json, {unexpected[0]} first",
            where=str(path),
            fix="use weights and config.json of the same model",
        )
    state = model.state_dict()
    for name, tensor in state.items():
        known = tensor.is_floating_point() and not tensor.is_meta
        if known and not torch.isfinite(tensor).all():
            raise ModelError(
                f"tensor {name} contains NaN or infinity", where=str(path), fix="use an earlier checkpoint"
            )
    ignored = [name for name in tensor_names(path) if harmless.search(name) and name not in state]
    return [_ignored_note(ignored)] if ignored else []


def _harmless_pattern(model: nn.Module) -> re.Pattern[str]:
    own = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return re.compile("|".join(f"({pattern})" for pattern in (*_HARMLESS, *sorted(own))))


def _ignored_note(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"ignoring tensors of the weights that the model does not use: {', '.join(names[:_NAMED])}{more}"


def _refuse_mismatched(mismatched: Iterable[Any], path: Path) -> None:
    for entry in sorted(mismatched, key=str):
        name, *shapes = entry if isinstance(entry, (tuple, list)) else (entry,)
        mismatch = ", but the configuration expects ".join(str(list(shape)) for shape in shapes)
        what = f"tensor {name} has the wrong shape" + (f": {mismatch}" if mismatch else "")
        raise ModelError(what, where=str(path), fix="use weights and config.json of the same model")


def untie_own_head(model: nn.Module) -> list[str]:
    """Set the configuration of a model with a head of its own to untied, so that every loader reads the same model.

    transformers leaves a head of its own in the weights untied whatever the configuration says; other loaders tie it.

    Returns:
        A note if the configuration was changed.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    own, shared = getattr(head, "weight", None), getattr(embedding, "weight", None)
    configs = [config for config in all_configs(model.config) if getattr(config, "tie_word_embeddings", False)]
    if not configs or own is None or shared is None or own is shared or own.shape != shared.shape:
        return []
    for config in configs:
        config.tie_word_embeddings = False
    return [
        "the configuration ties the head to the embedding, but the weights hold a head of its own; "
        "using that head, saved as untied"
    ]


def all_configs(config: Any) -> list[Any]:
    """A configuration and those inside it."""
    from transformers import PretrainedConfig

    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [config, *(each for part in inner for each in all_configs(part))]
