"""Which setting to change so that a training fits into memory, found by predicting it again with the change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tisdpo_cli.engine.training.batching import Microbatching
from tisdpo_cli.engine.training.planning import Change, Launch, PassSize
from tisdpo_cli.model.shapes import ModelShape

_LORA_R = 8
# Predicts the peak memory in bytes.
Predict = Callable[[ModelShape, Launch, PassSize], int]


@dataclass(frozen=True)
class Choices:
    """What may be changed.

    Attributes:
        shape: of the model.
        launch: how it runs now.
        size: of the largest forward pass now.
        split: how a batch is split into forward passes now.
        longest: tokens of the longest example, which no forward pass can be smaller than.
        adaptable: whether an adapter could be trained instead of the whole model.
    """

    shape: ModelShape
    launch: Launch
    size: PassSize
    split: Microbatching
    longest: int
    adaptable: bool


def best_change(choices: Choices, limit: int, predict: Predict) -> Change | None:
    """The first change that suffices, of those that cost least time first; else the one that saves most.

    Args:
        choices: what may be changed.
        limit: memory in bytes that there is.
        predict: of a changed training.
    """
    changes = []
    for setting, value, shape, launch, size in _candidates(choices):
        changes.append(Change(setting, value, predict(shape, launch, size)))
        if changes[-1].total <= limit:
            return changes[-1]
    return min(changes, key=lambda change: change.total, default=None)


_Candidate = tuple[str, "int | str | bool", ModelShape, Launch, PassSize]


def _candidates(choices: Choices) -> Iterator[_Candidate]:
    shape, launch, size = choices.shape, choices.launch, choices.size
    yield from _smaller_passes(choices)
    if launch.processes > 1 and not launch.sharded and not launch.quantized:
        yield "shard", "full", shape, replace(launch, sharded=True), size
    if not launch.gradient_checkpointing:
        yield "gradient_checkpointing", True, shape, replace(launch, gradient_checkpointing=True), size
    if launch.sharded and launch.on_gpu and not launch.offload:
        yield "cpu_offload", True, shape, replace(launch, offload=True), size
    if choices.adaptable:
        yield "lora_r", _LORA_R, with_adapter(shape, _LORA_R), launch, size


def _smaller_passes(choices: Choices) -> Iterator[_Candidate]:
    """Half as many tokens in a forward pass, and half again."""
    split, size, factor = choices.split, choices.size, 2
    while size.tokens // factor >= choices.longest:
        smaller = PassSize(size.tokens // factor, max(1, size.scored // factor))
        if split.tokens is not None:
            yield "tokens_per_microbatch", smaller.tokens, choices.shape, choices.launch, smaller
        elif split.micro is not None and split.micro // factor:
            yield "micro_batch_size", split.micro // factor, choices.shape, choices.launch, smaller
        elif split.passes is not None:
            yield "gradient_accumulation", split.passes * factor, choices.shape, choices.launch, smaller
        factor *= 2


def with_adapter(shape: ModelShape, rank: int) -> ModelShape:
    """The shape of a model with a new adapter on all linear layers."""
    adapter = rank * shape.features
    return replace(
        shape,
        root_frozen=shape.root,
        root_trained=0,
        body_frozen=shape.body_frozen + shape.body_trained,
        body_trained=adapter,
        active=shape.active + adapter,
        trains_head=False,
    )
