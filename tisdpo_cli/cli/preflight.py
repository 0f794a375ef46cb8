"""Checks before anything heavy is imported: do the models, datasets and checkpoints exist, can the trackers run?"""

from __future__ import annotations

from pathlib import Path

from tisdpo_cli.cli.sharing import check_sharing
from tisdpo_cli.data.locate import find_splits, training_splits
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.runs.checkpoints import open_checkpoint
from tisdpo_cli.runs.trackers import check_trackers
from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.datasets import DatasetPart, parts_of
from tisdpo_cli.settings.evaluate import Evaluate
from tisdpo_cli.settings.fields import meta
from tisdpo_cli.settings.groups import TrainingData
from tisdpo_cli.settings.run import Run
from tisdpo_cli.settings.train_pairs import TrainPairs
from tisdpo_cli.settings.train_sft import TrainSft


def check(settings: Command) -> None:
    """Check every model, dataset and checkpoint that the settings name; a mistyped path is found in a moment.

    Raises:
        UsageError, ModelError, DataError: the first one that is unusable.
    """
    trust = _trusts_remote_code(settings)
    datasets: list[DatasetPart] = []
    models = []
    for name, info, value in settings.leaves():
        reads = meta(info).get("reads")
        if value is None or reads is None:
            continue
        if reads == "dataset":
            datasets += parts_of(value)
        else:
            several = settings.models() if isinstance(settings, Evaluate) and name == "model" else [value]
            models += [(name, model) for model in several]
    data = _training_data(settings)
    for part in datasets:
        if data is None:
            find_splits(part.path)
        else:
            split, eval_split = part.split or data.split, part.eval_split or data.eval_split
            training_splits(part.path, split, eval_split, data.eval_size is not None)
    checkpoints = getattr(settings, "checkpoints", None)
    if checkpoints is not None and checkpoints.resume not in ("auto", "never"):
        open_checkpoint(Path(checkpoints.resume).expanduser())
    for stage in settings.stages().values() if isinstance(settings, Run) else [settings]:
        check_trackers(stage.tracking.names() if isinstance(stage, TrainPairs | TrainSft) else ())
    for name, model in models:
        locate_model(model, f"--{name.replace('_', '-')}", trust and name != "reward_model")
    check_sharing(settings)


def _training_data(settings: Command) -> TrainingData | None:
    """How the dataset is split, or None if the command does not split it."""
    if isinstance(settings, Run):
        settings = next(iter(settings.stages().values()))
    data = getattr(settings, "data", None)
    return data if isinstance(data, TrainingData) else None


def _trusts_remote_code(settings: Command) -> bool:
    if isinstance(settings, Run):
        settings = next(iter(settings.stages().values()))
    return bool(getattr(settings, "trust_remote_code", False))
