"""Checks that need nothing heavy: are the models and datasets there? A mistyped path is told in a moment."""

from __future__ import annotations

from pathlib import Path

from tisdpo_cli.data.reader import find_splits
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.runs.checkpoints import open_checkpoint
from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.evaluate import Evaluate
from tisdpo_cli.settings.run import Run

_MODELS = ("model", "baseline", "ref_model", "forward", "reverse", "reward_model")
_DATASETS = ("dataset", "scored")


def check(settings: Command) -> None:
    """Look at every model and dataset that a command names.

    Raises:
        UsageFault, ModelError, DataError: what is wrong with the first that cannot be used.
    """
    trust = getattr(settings, "trust_remote_code", False)
    if isinstance(settings, Run):
        first = next(iter(settings.stages().values()))
        trust = getattr(first, "trust_remote_code", False)
    for name in _DATASETS:
        dataset = getattr(settings, name, None)
        if dataset is not None:
            find_splits(dataset)
    checkpoints = getattr(settings, "checkpoints", None)
    if checkpoints is not None and checkpoints.resume not in ("auto", "never"):
        open_checkpoint(Path(checkpoints.resume).expanduser())
    for name in _MODELS:
        value = getattr(settings, name, None)
        several = settings.models() if isinstance(settings, Evaluate) and name == "model" else [value]
        for model in several:
            if model is not None:
                locate_model(model, f"--{name.replace('_', '-')}", trust and name != "reward_model")
