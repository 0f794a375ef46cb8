"""Runs the last layer of a language model only at the positions that its head needs.

Pure torch. Knows how layers are built, but no model family. Legend: N selected positions, R rows, T positions, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class LastLayer:
    """The last layer of a model, cut short after its attention.

    Keys and values cover all positions. Everything after the attention, the residual stream included, is computed at
    the selected positions only, so that the layer returns [1, N, H]. This uses hooks on the layer's parts and relies on
    nothing after the attention reading other positions; the caller must check the numbers.

    Raises:
        ValueError: the parts of the layer have unknown names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layer = decoder_layers(model)[-1]
        self._norm = _one_of(self._layer, ("input_layernorm", "ln_1"))
        self._attention = _one_of(self._layer, ("self_attn", "attention", "attn"))
        self._projection = _one_of(self._attention, ("o_proj", "dense", "c_proj"))

    @property
    def recomputed(self) -> bool:
        """Whether the backward pass recomputes its activations, when positions are no longer selected."""
        return self._layer.training and getattr(self._layer, "gradient_checkpointing", False)

    @contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        """Within this context, the layer continues with these positions [N] of the flattened rows."""
        full: list[Tensor] = []

        def select(hidden: Tensor) -> Tensor:
            return at_positions(hidden, positions)[None]

        def enter(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            full[:] = inputs[:1]
            return (select(inputs[0]), *inputs[1:])

        def attend(_module: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            normed = self._norm(full[0])
            return ((normed, *inputs[1:]), kwargs) if inputs else (inputs, {**kwargs, "hidden_states": normed})

        hooks = (
            self._layer.register_forward_pre_hook(enter),
            self._attention.register_forward_pre_hook(attend, with_kwargs=True),
            self._projection.register_forward_pre_hook(lambda _module, inputs: (select(inputs[0]), *inputs[1:])),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Select the states [N, H] at positions [N] of the flattened rows [R, T, H]."""
    # index_select, because the backward of indexing is not deterministic on several threads.
    return hidden.flatten(0, 1).index_select(0, positions)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a language model.

    Raises:
        ValueError: it has no list of them.
    """
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError("the model has no list of layers")


def _one_of(module: nn.Module, names: Sequence[str]) -> nn.Module:
    parts = [getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)]
    if len(parts) != 1:
        raise ValueError(f"{type(module).__name__} has no {' or '.join(names)}")
    return parts[0]
