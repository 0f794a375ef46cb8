"""The last layer of a language model at the positions that its head will see, and at no others.

Pure torch: it knows how layers are built, and no family. Legend: N chosen positions, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class LastLayer:
    """The last layer of a model, which reads all positions and goes on with some of them.

    Its keys and values are those of all positions; what comes after its attention, its residual stream included, is
    computed at the chosen positions alone, so that the layer returns [1, N, H]. By hooks, not by families: between the
    sum of attention and the residual stream and the end of a layer nothing looks at other positions. Whether that is
    so in a model is for the caller to find out.

    Raises:
        ValueError: its parts have names of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layer = _last_of_its_kind(model)
        self._norm = _one_of(self._layer, ("input_layernorm", "ln_1"))
        self._attention = _one_of(self._layer, ("self_attn", "attention", "attn"))
        self._projection = _one_of(self._attention, ("o_proj", "dense", "c_proj"))

    @property
    def recomputed(self) -> bool:
        """Whether its activations are made again in the backward pass, when no position is chosen any more."""
        return self._layer.training and getattr(self._layer, "gradient_checkpointing", False)

    @contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        """While this lasts, the layer goes on with these positions [N] of the flattened rows."""
        every: list[Tensor] = []

        def chosen(hidden: Tensor) -> Tensor:
            return at_positions(hidden, positions)[None]

        def enter(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            every[:] = inputs[:1]
            return (chosen(inputs[0]), *inputs[1:])

        def attend(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> Any:
            normed = self._norm(every[0])
            return ((normed, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": normed})

        hooks = (
            self._layer.register_forward_pre_hook(enter),
            self._attention.register_forward_pre_hook(attend, with_kwargs=True),
            self._projection.register_forward_pre_hook(lambda _module, inputs: (chosen(inputs[0]), *inputs[1:])),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """The states [N, H] at positions [N] of the flattened rows [R, T, H]."""
    # index_select, not indexing: the backward of indexing is not deterministic on several threads.
    return hidden.flatten(0, 1).index_select(0, positions)


def _last_of_its_kind(model: nn.Module) -> nn.Module:
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module[-1]
    raise ValueError("it has no list of layers")


def _one_of(module: nn.Module, names: Sequence[str]) -> nn.Module:
    found = [getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)]
    if len(found) != 1:
        raise ValueError(f"{type(module).__name__} has no {' or '.join(names)}")
    return found[0]
