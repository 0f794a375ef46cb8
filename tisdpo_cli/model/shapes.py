"""The sizes of a model, counted by where they are held and what is computed with them. Needs no values of its weights.

A model may be on the meta device, as `outline` loads it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tisdpo_cli.model.adapters import LoraShape, attach_new
from tisdpo_cli.model.directory import weight_files
from tisdpo_cli.model.last_layer import decoder_layers
from tisdpo_cli.model.loading import load_model

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_FEED_FORWARD = ("intermediate_size", "ffn_dim", "n_inner")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model; all counts are numbers of parameters, and a tied tensor counts once.

    Attributes:
        layers: number of decoder layers.
        width: of the hidden states.
        feed_forward: width inside the feed-forward layers that one token passes.
        attention: width of all attention heads of a layer.
        vocabulary: rows of the head.
        root_frozen: outside the decoder layers, not trained.
        root_trained: outside the decoder layers, trained.
        body_frozen: in the decoder layers, not trained.
        body_trained: in the decoder layers, trained.
        largest_layer: in the largest decoder layer.
        active: in the decoder layers, of what one token is multiplied with: of the experts those that it passes.
        linear: frozen weights of linear layers in the decoder layers, which 4 bits can hold.
        features: inputs and outputs of all linear layers in the decoder layers: what an adapter has for each rank.
        trains_head: whether the weights of the head get gradients.
    """

    layers: int
    width: int
    feed_forward: int
    attention: int
    vocabulary: int
    root_frozen: int
    root_trained: int
    body_frozen: int
    body_trained: int
    largest_layer: int
    active: int
    linear: int
    features: int
    trains_head: bool

    @property
    def root(self) -> int:
        """Outside the decoder layers: embedding, norm, head."""
        return self.root_frozen + self.root_trained

    @property
    def trained(self) -> int:
        """All that is trained."""
        return self.root_trained + self.body_trained

    @property
    def frozen(self) -> int:
        """All that is not trained."""
        return self.root_frozen + self.body_frozen

    @property
    def total(self) -> int:
        """All."""
        return self.trained + self.frozen


def outline(path: Path, trust_remote_code: bool = False, adapter: LoraShape | None = None) -> nn.Module:
    """The model that a training loads, without the values of its weights; its files get all checks that need none.

    Args:
        path: directory of a model or an adapter.
        trust_remote_code: whether custom code from the model repository may run.
        adapter: shape of a new adapter, or None to train the whole model (or the adapter that it is).

    Raises:
        ModelError: as `load_model`, except for values that are not finite.
        UsageError: the model has no layers of the names that the adapter asks for.
    """
    with warnings.catch_warnings():
        # Values that are copied into a tensor without any.
        warnings.filterwarnings("ignore", ".*is a no-op")
        model = load_model(path, trust_remote_code, outline=True)
        if adapter is not None and not any(not p.requires_grad for p in model.parameters()):
            attach_new(model, adapter, 0)
    return model


def file_bytes(path: Path) -> int:
    """Size of the weight files of a whole model, in bytes."""
    return sum(file.stat().st_size for file in weight_files(path))


def measure(model: nn.Module) -> ModelShape:
    """The sizes of a model, of which everything that needs no gradients is frozen."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    layers = list(_layers(model))
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    body = [p for p in model.parameters() if id(p) in in_layers]
    root = [p for p in model.parameters() if id(p) not in in_layers]
    matrices: list[Any] = [m for layer in layers for m in layer.modules() if _is_linear(m)]
    # With an adapter, its own are trained and what it adapts is not.
    adapted = _size(body, False) > 0
    linear = [m.weight for m in matrices if m.weight.requires_grad is not adapted]
    head = model.get_output_embeddings()  # type: ignore[operator]
    heads = getattr(config, "num_attention_heads", 1)
    return ModelShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        feed_forward=_feed_forward(config),
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=config.vocab_size,
        root_frozen=_size(root, False),
        root_trained=_size(root, True),
        body_frozen=_size(body, False),
        body_trained=_size(body, True),
        largest_layer=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        active=round(sum(_active(config, name, p) for layer in layers for name, p in layer.named_parameters())),
        linear=sum(weight.numel() for weight in linear) if adapted else 0,
        features=sum(sum(weight.shape) for weight in linear) + sum(_expert_features(config, p) for p in body),
        trains_head=head is not None and any(p.requires_grad for p in head.parameters()),
    )


def _layers(model: nn.Module) -> Iterable[nn.Module]:
    try:
        return decoder_layers(model)
    except ValueError:
        return []


def _size(parameters: Iterable[torch.nn.Parameter], trained: bool) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad is trained)


def _active(config: Any, name: str, parameter: nn.Parameter) -> float:
    """The parameters that a token passes of a tensor."""
    experts, chosen = _experts(config), getattr(config, "num_experts_per_tok", None)
    fused = parameter.dim() == 3 and parameter.shape[0] == experts
    if experts and chosen and (fused or _OF_ONE_EXPERT.search(f".{name}")):
        return parameter.numel() * chosen / experts
    return parameter.numel()


def _is_linear(module: nn.Module) -> bool:
    # Adapters have layers of the same name; Conv1D is that of GPT-2.
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _expert_features(config: Any, parameter: nn.Parameter) -> int:
    """Inputs and outputs of experts whose weights are in one tensor [experts, out, in]."""
    fused = parameter.dim() == 3 and parameter.shape[0] == _experts(config)
    return parameter.shape[0] * (parameter.shape[1] + parameter.shape[2]) if fused else 0


def _experts(config: Any) -> int:
    return next((value for name in _EXPERTS if (value := getattr(config, name, None))), 0)


def _feed_forward(config: Any) -> int:
    inner = next((value for name in _FEED_FORWARD if (value := getattr(config, name, None))), 4 * config.hidden_size)
    if not _experts(config):
        return int(inner)
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return int((getattr(config, "moe_intermediate_size", None) or inner) * config.num_experts_per_tok + shared)
