"""What a dry run predicts of a training, in a few aligned lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.memory_advice import change_advice

if TYPE_CHECKING:
    from tisdpo_cli.engine.training.planning import Prediction

_NAMES = {"program": "program and data", "head": "logits", "gathered": "gathered weights", "update": "copy for update"}
_FLOPS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
_TIMES = ((172_800, 86_400, "days"), (5400, 3600, "hours"), (90, 60, "minutes"))


def prediction_lines(prediction: Prediction) -> list[str]:
    """Lines that show a prediction."""
    memory, disk, flops, seconds = prediction.memory, prediction.disk, prediction.flops, prediction.seconds
    each, whose = "", ""
    if prediction.processes > 1:
        each, whose = " for each", f" of each of {prediction.processes} processes"
        whose += ", sharded" if prediction.sharded else ""
    stages = ", ".join(
        f"{stage} {_flops(flops[stage])} in {duration(took)}" if stage in flops else f"{stage} {duration(took)}"
        for stage, took in seconds.items()
    )
    what = f"peak memory{whose}" if prediction.when == "training" else f"peak memory{whose}, while {prediction.when}"
    total = f"about {duration(sum(seconds.values()))}"
    if flops:
        total = f"{_flops(sum(flops.values()))}, {total}"
    wanted = f" ({_parts(disk)})" if disk else ""
    measured = prediction.timed_by == "forward pass"
    return [
        "a prediction from shapes, and the time from a measured forward pass:"
        if measured
        else "a prediction from shapes alone, no weights were read:",
        f"  {what}: {_size(sum(memory.values()))} of {_size(prediction.device_memory)}{each}",
        *(f"    {_NAMES.get(name, name):18s} {_size(size):>10s}" for name, size in memory.items()),
        f"  disk: {_size(sum(disk.values()))} of {_size(prediction.free_disk)} free{wanted}",
        f"  time: {total} ({stages})",
    ]


def misfits(prediction: Prediction, settings: Command) -> list[str]:
    """Warnings of what will not suffice, with what to change."""
    lines, change = [], prediction.change
    if not prediction.fits:
        advice = "use a smaller model"
        if change is not None:
            advice = f"{change_advice(settings, change.setting, change.value)} (then {_size(change.total)})"
            advice += ", which does not suffice alone" if change.total > prediction.device_memory else ""
        memory = f"{_size(sum(prediction.memory.values()))} of {_size(prediction.device_memory)}"
        lines.append(f"will probably run out of memory: {memory}; {advice}")
    if not prediction.fits_disk:
        lines.append(
            f"will probably run out of disk: {_size(sum(prediction.disk.values()))} of {_size(prediction.free_disk)} "
            "free; lower --keep-checkpoints, or choose another --output-dir"
        )
    return lines


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{_NAMES.get(name, name)} {_size(size)}" for name, size in parts.items())


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _flops(count: float) -> str:
    unit, letter = next((pair for pair in _FLOPS if count >= pair[0]), (1e3, "k"))
    return f"{count / unit:.1f} {letter}FLOP"


def duration(seconds: float) -> str:
    """About how long something takes, in the unit that people would use."""
    for least, unit, name in _TIMES:
        if seconds >= least:
            return f"{seconds / unit:.1f} {name}"
    return f"{max(1, round(seconds))} s"
