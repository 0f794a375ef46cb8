"""What `run` decides for its stages: which output is whose input, and which values of a layer belong to a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tisdpo_cli.settings.commands import STAGES, Stages, stage_command
from tisdpo_cli.settings.names import resolve


@dataclass(frozen=True)
class Layer:
    """Values of one source by dotted name, and what to call the source."""

    origin: str
    values: dict[str, Any]


_DIRECTORIES = {
    "train_sft": "sft",
    "train_dpo": "dpo",
    "train_reverse": "reverse",
    "estimate": "scored",
    "train": "tisdpo",
}


def wiring(head: Stages, with_sft: bool) -> dict[str, dict[str, Any]]:
    """What the pipeline itself decides in each stage: which output is whose input."""
    at = {stage: str(Path(head.output_dir) / name) for stage, name in _DIRECTORIES.items()}
    start = at["train_sft"] if with_sft else head.model
    common = {"dataset": head.dataset, "overwrite": head.overwrite}
    # A dry run of one stage would leave the next without its input.
    trained = {**common, "dry_run": False}
    wired: dict[str, dict[str, Any]] = {}
    if with_sft:
        wired["train_sft"] = {**trained, "model": head.model, "init": head.model is None, "output_dir": at["train_sft"]}
    for stage in ("train_dpo", "train_reverse"):
        wired[stage] = {**trained, "model": start, "output_dir": at[stage]}
    models = {"forward": at["train_dpo"], "reverse": at["train_reverse"]}
    wired["estimate"] = {**common, **models, "output_dir": at["estimate"]}
    wired["train"] = {**trained, "model": start, "dataset": at["estimate"], "output_dir": at["train"]}
    wired["inspect_weights"] = {"scored": at["estimate"]}
    return wired


def stage_layer(stage: str, layer: Layer, wired: Mapping[str, Any], faults: list[str]) -> Layer:
    """What a layer says of a stage. Its own section wins over the top of the same layer."""
    command = stage_command(stage)
    values: dict[str, Any] = {}
    for name, value in layer.values.items():
        first, _, rest = name.partition(".")
        path = None if first in STAGES else resolve(command, name)
        if path is not None and path not in wired:
            values[path] = value
    for name, value in layer.values.items():
        first, _, rest = name.partition(".")
        if first != stage or not rest:
            continue
        if rest in wired and str(value).lower() != str(wired[rest]).lower():
            faults.append(f"{stage}.{rest} is decided by run; set it at the top or run the stage by itself")
        elif rest not in wired:
            values[rest] = value
    return Layer(layer.origin, values)
