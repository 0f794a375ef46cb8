"""Stand-ins for what a stage of a pipeline reads and no stage has made yet, so that a dry run can do every stage.

A model that will be trained has the shape and the tokenizer of the one that its training starts from. A scored dataset
has the rows of the dataset that is scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tisdpo_cli.engine.training.sft import make_untrained
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.estimate import Estimate
from tisdpo_cli.settings.groups import TrainingData
from tisdpo_cli.settings.train_pairs import Train, TrainDpo, TrainPairs
from tisdpo_cli.settings.train_sft import TrainSft

# What a dry run of `train` takes from its own settings; the rest is that of the rows that will be scored.
_OWN_LIMITS = ("max_length", "max_prompt_length", "keep_prompt")


class StandIns:
    """Stand-ins of outputs that are not there, kept in a temporary directory."""

    def __init__(self, stages: Mapping[str, Command], directory: Path) -> None:
        """Make none yet.

        Args:
            stages: of the pipeline.
            directory: for what has to be written.
        """
        self._stages, self._directory = stages, directory
        self._models: dict[str, str] = {}
        self._places = {str(getattr(stage, "output_dir", "")): name for name, stage in stages.items()}

    def settings(self, name: str, missing: Mapping[str, bool]) -> Command:
        """The settings for a dry run of a stage.

        Args:
            name: of the stage.
            missing: stage to whether its output is not there, or will be another one.
        """
        stage = self._stages[name]
        if isinstance(stage, Train) and missing.get("estimate"):
            stage = self._of_unscored_rows(stage)
        changed: dict[str, Any] = {"dry_run": True}
        for option in ("model", "ref_model", "forward", "reverse"):
            source = self._places.get(getattr(stage, option, None) or "")
            if source is not None and missing[source]:
                changed[option] = self._model(source, apart=option in ("forward", "reverse"))
        return stage.with_values(changed)

    def _of_unscored_rows(self, stage: Train) -> TrainPairs:
        """The same training without weights, on the rows that will be scored."""
        scoring = self._stages["estimate"]
        assert isinstance(scoring, Estimate)
        limits = {name: getattr(stage.data, name) for name in _OWN_LIMITS}
        data: TrainingData = scoring.data.model_copy(update=limits)
        values = {name: getattr(stage, name) for name in TrainDpo.model_fields}
        return TrainDpo.model_construct(**{**values, "dataset": scoring.dataset, "data": data})

    def _model(self, name: str, apart: bool = False) -> str:
        """A model of the shape that a training will make.

        Args:
            name: of the training.
            apart: whether it is in memory beside others of its base model, unless it is an adapter of it.
        """
        stage = self._stages[name]
        assert isinstance(stage, TrainPairs | TrainSft)
        start = self._start(name, stage)
        if apart and stage.adapter.lora_r is None:
            return self._copy(name, locate_model(start, "--model", stage.trust_remote_code))
        return start

    def _start(self, name: str, stage: TrainPairs | TrainSft) -> str:
        if stage.model is None:
            if name not in self._models:
                assert isinstance(stage, TrainSft)
                make_untrained(stage, self._directory / name)
                self._models[name] = str(self._directory / name)
            return self._models[name]
        source = self._places.get(stage.model)
        return self._model(source) if source is not None and not _is_made(stage.model) else stage.model

    def _copy(self, name: str, model: Path) -> str:
        """A directory of its own for a model, with links to its files: then it counts as another one."""
        place = self._directory / f"{name}-apart"
        try:
            place.mkdir(exist_ok=True)
            for file in model.iterdir():
                link = place / file.name
                if file.is_file() and not link.exists():
                    link.symlink_to(file.resolve())
        except OSError:  # a system that does not let everyone link
            return str(model)
        return str(place)


def _is_made(model: str) -> bool:
    return (Path(model) / "config.json").is_file()
