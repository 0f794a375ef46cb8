"""How `run` wires its stages: which output is whose input, and which values of a layer belong to a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tisdpo_cli.settings.adapter import Adapter
from tisdpo_cli.settings.groups import Data, TrainingData
from tisdpo_cli.settings.names import resolve
from tisdpo_cli.settings.run import STAGES, Stages
from tisdpo_cli.settings.train_sft import TrainSft


@dataclass(frozen=True)
class Layer:
    """Values of one source by dotted name, and the name of the source."""

    origin: str
    values: dict[str, Any]


_DIRECTORIES = {
    "train_sft": "sft",
    "train_dpo": "dpo",
    "train_reverse": "reverse",
    "sft_chosen": "sft-chosen",
    "sft_rejected": "sft-rejected",
    "estimate": "scored",
    "train": "tisdpo",
}


def stage_directories() -> tuple[str, ...]:
    """The names of the stages' outputs in that of a pipeline, in order."""
    return tuple(_DIRECTORIES.values())


# The stages that train the contrastive models (positive, negative), for each method.
_CONTRAST: dict[str, tuple[str, ...]] = {
    "dpo": ("train_dpo", "train_reverse"),
    "sft": ("sft_chosen", "sft_rejected"),
    "prompt": (),
}


def planned(method: str, with_sft: bool) -> list[str]:
    """The stages of a pipeline, in order."""
    left_out = {stage for name, stages in _CONTRAST.items() if name != method for stage in stages}
    return [stage for stage in STAGES if stage not in left_out and (with_sft or stage != "train_sft")]


def wiring(head: Stages, with_sft: bool) -> dict[str, dict[str, Any]]:
    """The values that the pipeline sets in each stage: which output is whose input."""
    at = {stage: str(Path(head.output_dir) / name) for stage, name in _DIRECTORIES.items()}
    start = at["train_sft"] if with_sft else head.model
    scored = {} if isinstance(head.dataset, str) else Data.of_mixture()
    # A dry run of one stage alone would leave the next without its input.
    common = {"dataset": head.dataset, "overwrite": head.overwrite, "num_processes": 1, "dry_run": False}
    trained = {**common, "model": start}
    # A contrastive model starts from an existing one: settings for the shape of a new one do not apply.
    tuned = {**trained, "init": False, **TrainSft.new_model_shape()}
    # A model that is made anew has nothing that an adapter could be put on.
    whole = Adapter.none() if head.model is None else {}
    positive, negative = [at[stage] for stage in _CONTRAST[head.method]] or (None, None)
    return {
        "train_sft": {
            **trained,
            **whole,
            "model": head.model,
            "init": head.model is None,
            "output_dir": at["train_sft"],
        },
        "train_dpo": {**trained, "output_dir": at["train_dpo"]},
        "train_reverse": {**trained, "output_dir": at["train_reverse"]},
        "sft_chosen": {**tuned, "target": "chosen", "output_dir": at["sft_chosen"]},
        "sft_rejected": {**tuned, "target": "rejected", "output_dir": at["sft_rejected"]},
        "estimate": {
            **common,
            "forward": positive,
            "reverse": negative,
            "model": start if head.method == "prompt" else None,
            "output_dir": at["estimate"],
        },
        "train": {
            **trained,
            **TrainingData.of_scored_dataset(),
            **scored,
            "dataset": at["estimate"],
            "output_dir": at["train"],
        },
        "inspect_weights": {**scored, "scored": at["estimate"], "html": str(Path(head.output_dir) / "report.html")},
    }


def stage_layer(stage: str, layer: Layer, wired: Mapping[str, Any], faults: list[str]) -> Layer:
    """The values of a layer for a stage. The section of the stage wins over the top level of the same layer."""
    command = STAGES[stage]
    values: dict[str, Any] = {}
    for name, value in layer.values.items():
        first, _, rest = name.partition(".")
        path = None if first in STAGES else resolve(command, name)
        if path is not None and path not in wired:
            values[path] = value
    values |= _shared_with_training(stage, layer)
    for name, value in layer.values.items():
        first, _, rest = name.partition(".")
        if first != stage or not rest:
            continue
        if rest in wired and str(value).lower() != str(wired[rest]).lower():
            faults.append(f"{stage}.{rest} is set by run; leave it out, or run the stage on its own")
        elif rest not in wired:
            values[rest] = value
    return Layer(layer.origin, values)


def _shared_with_training(stage: str, layer: Layer) -> dict[str, Any]:
    """The report shows the weights that `train` used, so its section applies to them too."""
    if stage != "inspect_weights":
        return {}
    inner = {name.partition(".")[2]: value for name, value in layer.values.items() if name.startswith("train.")}
    paths = {resolve(STAGES[stage], name): value for name, value in inner.items()}
    return {path: value for path, value in paths.items() if path is not None and path.startswith("weights.")}
