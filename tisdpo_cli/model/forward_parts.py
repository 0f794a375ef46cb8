"""Runs a model's own forward without its body, or with other inputs of its head. Pure torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def replacing_input(head: nn.Module | None, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this context, the head gets `replace` of its input."""
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _head, inputs: (replace(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


class _BodyOutput:
    """Output of a transformers body with the last hidden state only."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, _name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> object:
        return (self.last_hidden_state,)[index]


@contextmanager
def bypassing_body(model: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Within this context, the model's body returns `hidden` [1, n, H] without computing anything."""
    body = model.get_decoder()  # type: ignore[operator]
    if body is model:
        yield
        return
    instance_forward = body.__dict__.get("forward")  # set by accelerate, for example
    body.forward = lambda *_args, **_kwargs: _BodyOutput(hidden)
    try:
        yield
    finally:
        del body.forward
        if instance_forward is not None:
            body.forward = instance_forward
