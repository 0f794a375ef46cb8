"""Predicts what a training needs, from shapes and counts alone: memory of each process, disk, FLOPs and time.

Pure: it is given plain values and measures nothing. Sizes are in bytes. What is counted follows the code that holds it:
`optimizer`, `sharded_model`, `model/head` and `model/logprobs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tisdpo_cli.model.head import head_bytes
from tisdpo_cli.model.shapes import ModelShape

# Bytes of state for each trained parameter. Adafactor keeps a row and a column of each matrix.
STATE_BYTES = {
    **{"sgd": 0.0, "adafactor": 0.01},
    **dict.fromkeys(("rmsprop", "adagrad"), 4.0),
    **dict.fromkeys(("adamw", "adam", "adamax", "nadam", "radam"), 8.0),
    **dict.fromkeys(("adamw8bit", "paged_adamw8bit"), 2.06),
}
_MOMENTUM_BYTES = 4.0
# Optimizers that need a copy of what they update on GPUs, where they update all tensors at once. Others are fused, or
# update one tensor after the other.
_COPIES_ON_GPU = ("rmsprop", "adagrad", "adamax", "nadam", "radam")
# A weight in 4 bits with its share of the scales, which are quantized too.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Values that the backward pass of a layer keeps for each token: this often its width, and that of its feed-forward.
_WIDTHS, _FEED_FORWARDS = 12, 4
# How much more that is with an adapter beside each linear layer, and in how many layers' place one is recomputed and
# passed backwards: measured, as are the numbers above.
_ADAPTED, _RECOMPUTED_LAYERS = 1.5, 5
# The same for a layer that is left without a backward pass.
_FORWARD_WIDTHS, _FORWARD_FEED_FORWARDS = 6, 3
# Copies of a decoder layer while sharded ones are gathered: weights, those of the next, gradients, their sum.
_GATHERED_LAYERS, _GATHERED_ROOTS = 4, 3
# Share of the rate of matrix products that a training reaches (measured on CPUs, `tests/benchmarks/scaling.py`).
_SHARE_OF_RATE = {"float32": 0.5, "bf16": 0.35}


@dataclass(frozen=True)
class Launch:
    """On what a training runs, and how.

    Attributes:
        processes: number of processes.
        on_gpu: whether each has a GPU; otherwise all share the memory and cores of one machine.
        sharded: whether weights, gradients and optimizer are split over the processes.
        offload: whether shards are in CPU memory while they are not in use.
        precision: `bf16` or `float32`, what is computed in.
        optimizer: its name.
        gradient_checkpointing: whether activations are recomputed.
        quantized: whether frozen linear layers are in 4 bits.
        momentum: whether the optimizer has momentum that can be switched off.
    """

    processes: int
    on_gpu: bool
    sharded: bool
    offload: bool
    precision: str
    optimizer: str
    gradient_checkpointing: bool
    quantized: bool
    momentum: bool = False


@dataclass(frozen=True)
class PassSize:
    """The largest forward pass: tokens, padding included, and how many of them are scored."""

    tokens: int
    scored: int


@dataclass(frozen=True)
class Work:
    """What a stage computes: tokens, how many of them are scored, and the sum over tokens of those that each sees."""

    tokens: float
    scored: float
    seen: float

    def times(self, factor: float) -> Work:
        """The same work so often."""
        return Work(self.tokens * factor, self.scored * factor, self.seen * factor)

    def plus(self, other: Work) -> Work:
        """Both."""
        return Work(self.tokens + other.tokens, self.scored + other.scored, self.seen + other.seen)


@dataclass(frozen=True)
class OtherModel:
    """A reference model that is loaded beside the policy.

    Attributes:
        size: of its weights in memory, in bytes.
        file: of its weight files.
        in_training: whether training needs it, and not only the pass before.
    """

    size: int
    file: int
    in_training: bool


@dataclass(frozen=True)
class Memory:
    """Predicted peak memory of the largest process, in bytes.

    Attributes:
        parts: by what holds it, where the sum is largest.
        when: in which phase that is: `training` or `loading`.
    """

    parts: Mapping[str, int]
    when: str

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Change:
    """A setting that lowers memory, its value, and the total in bytes that is predicted with it."""

    setting: str
    value: int | str | bool
    total: int


@dataclass(frozen=True)
class Prediction:
    """What a training is predicted to need. Sizes in bytes, times in seconds; by part or by stage.

    Attributes:
        processes: number of processes.
        device: `cpu` or `cuda`.
        sharded: whether the model is split over them.
        memory: of the largest process.
        when: phase of the largest memory.
        device_memory: what there is for each process.
        disk: of everything that is written.
        free_disk: of the file system of the output directory.
        flops: floating-point operations, over all processes.
        seconds: about how long they take.
        change: the setting to change if memory does not suffice, or None.
        timed_by: what told how fast this machine is: `matrix products`, or a `forward pass` of the model.
    """

    processes: int
    device: str
    sharded: bool
    memory: Mapping[str, int]
    when: str
    device_memory: int
    disk: Mapping[str, int]
    free_disk: int
    flops: Mapping[str, float]
    seconds: Mapping[str, float]
    change: Change | None
    timed_by: str = "matrix products"

    @property
    def fits(self) -> bool:
        """Whether the predicted memory is there."""
        return sum(self.memory.values()) <= self.device_memory

    @property
    def fits_disk(self) -> bool:
        """Whether the predicted disk is there."""
        return sum(self.disk.values()) <= self.free_disk

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        totals = {"memory_total": sum(self.memory.values()), "disk_total": sum(self.disk.values())}
        return {**asdict(self), **totals, "fits": self.fits, "fits_disk": self.fits_disk}


# Memory ----------------------------------------------------------------------------------------------------------


def predict_memory(
    shape: ModelShape, launch: Launch, size: PassSize, program: int, file: int, reference: OtherModel | None = None
) -> Memory:
    """Peak memory of the process that needs most.

    Args:
        shape: of the model, with its adapter if it has one.
        launch: how the training runs.
        size: of the largest forward pass with a backward pass.
        program: what the program itself and the data take.
        file: size of the weight files, which CPUs hold mapped while they copy the weights.
        reference: a model beside the policy, or None where the reference is the policy as it starts.
    """
    split = launch.processes if launch.sharded else 1
    weights, trained = weight_bytes(shape, launch), 4 * shape.trained
    # On a GPU shards that are not in use are in the memory of its machine.
    held = 0.0 if launch.sharded and launch.offload and launch.on_gpu else 1 / split
    states = state_bytes(launch.optimizer, launch.momentum) * shape.trained
    parts: dict[str, float] = {
        "program": program,
        "weights": weights * held,
        "gradients": trained * held,
        "optimizer": states * held,
    }
    if launch.processes > 1 and not launch.sharded:
        parts["communication"] = trained
    if launch.sharded:
        parts["gathered"] = _gathered(shape, weights)
    if reference is not None and reference.in_training:
        parts["reference"] = reference.size * held
    passing = {
        "activations": _activations(shape, launch, size.tokens),
        "head": head_bytes(size.scored, shape.vocabulary, shape.width, shape.trains_head, launch.precision == "bf16"),
    }
    copy = trained * held if launch.on_gpu and launch.optimizer in _COPIES_ON_GPU else 0.0
    if copy > sum(passing.values()):
        passing = {"update": copy}
    training = {name: round(value) for name, value in {**parts, **passing}.items() if value}
    loading = _loading(program, weights, file, launch, reference)
    if sum(loading.values()) > sum(training.values()):
        return Memory(loading, "loading")
    return Memory(training, "training")


def state_bytes(optimizer: str, momentum: bool) -> float:
    """Bytes of state for each trained parameter, with momentum that can be switched off or without."""
    return STATE_BYTES[optimizer] + (_MOMENTUM_BYTES if momentum else 0.0)


def weight_bytes(shape: ModelShape, launch: Launch) -> float:
    """The weights of a whole model: trained ones in float32, frozen ones in the precision of the computation."""
    frozen_bytes = 2 if launch.precision == "bf16" else 4
    low = shape.linear if launch.quantized else 0
    return 4 * shape.trained + frozen_bytes * (shape.frozen - low) + _NF4_BYTES * low


def _gathered(shape: ModelShape, weights: float) -> float:
    """What a process holds whole of a sharded model: all outside the layers, and the layers that are under way."""
    each = weights / max(1, shape.total)
    layers, roots = (_GATHERED_LAYERS, _GATHERED_ROOTS) if shape.trained > shape.frozen else (2, 1)
    return each * (roots * shape.root + layers * shape.largest_layer)


def _activations(shape: ModelShape, launch: Launch, tokens: int) -> float:
    """What the backward pass of the decoder layers needs of the forward pass."""
    low = launch.precision == "bf16"
    # Norms and the residual stream stay in float32.
    layer = (4.0 * _WIDTHS * shape.width) + (2 if low else 4) * _FEED_FORWARDS * shape.feed_forward
    # Copies of the weights to compute with.
    weights = 2.0 * shape.body_trained if low else 0.0
    if shape.trained < shape.frozen:
        layer *= _ADAPTED
    if launch.gradient_checkpointing:
        kept = 4.0 * shape.width * shape.layers + _RECOMPUTED_LAYERS * layer
        return tokens * kept + weights / max(1, shape.layers)
    # The backward pass of a layer has about as much as the layer has kept.
    return float(tokens) * (shape.layers + 1) * layer + weights


def forward_bytes(shape: ModelShape, size: PassSize) -> float:
    """What a forward pass without a backward pass takes at once."""
    layer = 4.0 * (_FORWARD_WIDTHS * shape.width + _FORWARD_FEED_FORWARDS * shape.feed_forward)
    return size.tokens * layer + head_bytes(size.scored, shape.vocabulary, shape.width, False, False)


def _loading(program: int, weights: float, file: int, launch: Launch, reference: OtherModel | None) -> dict[str, int]:
    """What loading takes. On a CPU weights are copied out of the file, the parts of which stay in memory until all are.

    A second model is loaded beside the first; then the file of the first is not needed any more.
    """
    parts = {"program": float(program), "weights": weights, "weight file": float(file)}
    if reference is not None:
        parts |= {"reference": reference.size, "weight file": reference.file}
    if launch.on_gpu:
        del parts["weight file"]
    return {name: round(value) for name, value in parts.items() if value}


# Disk ------------------------------------------------------------------------------------------------------------


def predict_disk(
    shape: ModelShape, optimizer: str, adapter: bool, checkpoints: int, cached_tokens: float, momentum: bool = False
) -> dict[str, int]:
    """What is written, in bytes by part.

    Args:
        shape: of the model.
        optimizer: its name.
        adapter: whether an adapter is saved rather than the whole model.
        checkpoints: number of them that are on disk at once.
        cached_tokens: tokens whose reference log-probs are cached.
        momentum: whether the optimizer has momentum that can be switched off.
    """
    saved = 4 * (shape.trained if adapter else shape.total)
    state = saved + state_bytes(optimizer, momentum) * shape.trained
    parts = {"checkpoints": checkpoints * state, "model": saved, "reference cache": 4 * cached_tokens}
    return {name: round(size) for name, size in parts.items() if size}


# FLOPs and time --------------------------------------------------------------------------------------------------


def forward_flops(shape: ModelShape, work: Work) -> float:
    """Multiplications and additions of a forward pass: two for each weight and token, the head where tokens are scored,
    and attention.
    """
    head = shape.vocabulary * shape.width * work.scored
    attention = 2 * shape.layers * shape.attention * work.seen
    return 2.0 * (shape.active * work.tokens + head + attention)


def training_flops(shape: ModelShape, work: Work, gradient_checkpointing: bool) -> float:
    """The same with the backward pass: twice as many again, but once where weights are frozen and get no gradients."""
    forward = forward_flops(shape, work)
    frozen = min(shape.active, shape.body_frozen)
    head = 0 if shape.trains_head else shape.vocabulary * shape.width
    without = 2.0 * (frozen * work.tokens + head * work.scored)
    again = 2.0 * shape.active * work.tokens if gradient_checkpointing else 0.0
    return 3 * forward - without + again


def seconds_of(flops: float, rate: float, precision: str, devices: int) -> float:
    """About how long so many operations take.

    Args:
        flops: over all devices.
        rate: of matrix products on one device, in operations per second.
        precision: `bf16` or `float32`.
        devices: number of them.
    """
    return flops / (share_of_rate(precision, rate) * devices)


def share_of_rate(precision: str, rate: float) -> float:
    """What a model reaches of the rate of matrix products."""
    return rate * _SHARE_OF_RATE[precision]
