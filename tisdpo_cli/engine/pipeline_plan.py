"""What `run` does with each stage: make, resume, redo or skip it, and why.

Stages that `run` made itself are remembered in a file of its output directory, by the content of their markers. They
are redone when a setting or an input has changed; anything else that is there stays unless `--overwrite` is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tisdpo_cli.engine.arguments import contrast_paths, find_dataset, scoring_request, with_recorded_reading
from tisdpo_cli.engine.training.arguments import sharding_of, training_request, with_token_budget
from tisdpo_cli.errors import ModelError, UsageError
from tisdpo_cli.files import RUN_FILE, reporting_write_errors, sha256, write_json
from tisdpo_cli.model.directory import locate_model, read_json
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.markers import Marker, changes_since, has_progress, marker_in, refuse_change
from tisdpo_cli.runs.outputs import refuse_links
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.sharding import Sharding
from tisdpo_cli.runs.stage import OutputRequest
from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.datasets import text_of
from tisdpo_cli.settings.estimate import Estimate
from tisdpo_cli.settings.fields import meta
from tisdpo_cli.settings.run import Run
from tisdpo_cli.settings.train_pairs import Train, TrainPairs
from tisdpo_cli.settings.train_sft import TrainSft

# Beside the outputs of the stages: stage to the hash of its marker, or that it was started.
MADE_FILE = ".stages.json"
_STARTED = "started"

Action = Literal["make", "resume", "redo", "skip"]


@dataclass(frozen=True)
class StagePlan:
    """What is done with a stage.

    Attributes:
        action: `make` what is not there, `resume` what was started, `redo` what has changed, or `skip` what is
            finished.
        reasons: why, one phrase each.
        depends: whether it depends on what stages before it will make.
    """

    action: Action
    reasons: Sequence[str] = ()
    depends: bool = False

    def __str__(self) -> str:
        return self.action + (f": {'; '.join(self.reasons)}" if self.reasons else "")


class PipelinePlan:
    """The stages of a pipeline and what has been made of them."""

    def __init__(self, settings: Run) -> None:
        """Look at nothing yet."""
        self.stages = settings.stages()
        self._overwrite = settings.overwrite
        self._root = Path(settings.output_dir)
        places = {str(_output(stage)): name for name, stage in self.stages.items()}
        self._inputs = {name: _read_from(stage, places) for name, stage in self.stages.items()}

    def sharding(self) -> Sharding | None:
        """How the first training that shards its model does it."""
        trainings = (stage for stage in self.stages.values() if isinstance(stage, TrainPairs | TrainSft))
        return next((found for stage in trainings if (found := sharding_of(stage)) is not None), None)

    def all(self, runtime: Runtime) -> dict[str, StagePlan]:
        """What is done with every stage, as far as it is known before any has run. Call it on one process.

        Raises:
            UsageError: a stage would have to be redone that `run` did not make.
        """
        if self._root.exists() and not self._root.is_dir():
            raise UsageError("is a file, not a directory", where=f"--output-dir {self._root}")
        refuse_links(self._root)
        plans: dict[str, StagePlan] = {}
        for name in self.stages:
            plans[name] = self.of(name, runtime, plans)
        return plans

    def of(self, name: str, runtime: Runtime, before: Mapping[str, StagePlan] | None = None) -> StagePlan:
        """What is done with a stage. Call it on one process.

        Args:
            name: of the stage.
            runtime: this process.
            before: plans of the stages before it, if they have not run yet.

        Raises:
            UsageError: it would have to be redone, and `run` did not make it.
        """
        stage = self.stages[name]
        path = _output(stage)
        marker = marker_in(path)
        if marker is None:
            return StagePlan("make")
        pending = {other: before[other] for other in self._inputs[name] if before and before[other].action != "skip"}
        request = _request(runtime, stage, pending=bool(pending))
        made_from = {**request.fingerprint, **({} if pending else request.content_hashes())}
        if pending:
            # What is read is not known yet.
            contents = marker.record["made_from"].items()
            made_from |= {key: value for key, value in contents if key.startswith("content of ")}
        changes = changes_since(marker, path, request.command, made_from)
        redone = [other for other, plan in pending.items() if plan.action == "redo"]
        after = [f"{shown(other)} is redone" for other in redone]
        unsure = [shown(other) for other in pending if other not in redone]
        after += [f"{other} is made first; skipped if that changes nothing" for other in unsure]
        if not changes and not pending:
            return StagePlan("skip") if marker.finished else StagePlan("resume")
        if not marker.finished and not has_progress(path):
            return StagePlan("make")
        if (changes or redone) and not self._overwrite and not self._is_own(name, marker):
            raise refuse_change(path, marker.finished, [*changes, *after])
        return StagePlan("redo", [*changes, *after], depends=bool(pending))

    def remember(self, name: str, finished: bool) -> None:
        """Remember that `run` starts a stage, or has finished it. Call it on one process."""
        path = self._root / MADE_FILE
        made = self._made()
        made[name] = sha256(_output(self.stages[name]) / RUN_FILE) if finished else _STARTED
        with reporting_write_errors(path):
            self._root.mkdir(parents=True, exist_ok=True)
            write_json(path, made)

    def adopt(self, name: str) -> None:
        """Remember a finished stage that `run` had started when it was killed. Call it on one process."""
        if self._made().get(name) == _STARTED:
            self.remember(name, finished=True)

    def _made(self) -> dict[str, Any]:
        path = self._root / MADE_FILE
        try:
            return read_json(path, "") if path.is_file() else {}
        except ModelError:  # damaged: then nothing is known to be made by `run`
            return {}

    def _is_own(self, name: str, marker: Marker) -> bool:
        """Whether `run` itself made a stage, and nobody has made it again by hand."""
        made = self._made().get(name)
        if not marker.finished:
            return made == _STARTED
        return made == sha256(_output(self.stages[name]) / RUN_FILE)


def shown(name: str) -> str:
    """The name of a stage as its command has it."""
    return name.replace("_", "-")


def _output(stage: Command) -> Path:
    return Path(stage.output_dir)  # type: ignore[attr-defined]


def _read_from(stage: Command, places: Mapping[str, str]) -> list[str]:
    """The stages whose outputs a stage reads."""
    read = [value for _, info, value in stage.leaves() if meta(info).get("reads") is not None]
    return [places[value] for value in dict.fromkeys(v for v in read if isinstance(v, str)) if value in places]


def _request(runtime: Runtime, stage: Command, pending: bool) -> OutputRequest:
    """The output that a stage creates.

    Args:
        runtime: this process.
        stage: its settings.
        pending: whether something that it reads is not there yet: then the contents cannot be hashed.
    """
    # An output keeps the token budget that it was started with, whatever happens to it.
    stage = stage.with_values({"overwrite": False})
    if isinstance(stage, Estimate):
        models: dict[str, Path | None] = {} if pending else dict(contrast_paths(stage))
        splits = {} if pending else find_dataset(stage.dataset, stage.data, Silent())
        return scoring_request(runtime, stage, models, splits)
    assert isinstance(stage, TrainPairs | TrainSft)
    if isinstance(stage, Train):
        stage = with_recorded_reading(stage, text_of(stage.dataset))
    training: Any = stage
    if pending:
        return training_request(runtime, with_token_budget(runtime, training, None), {}, {})
    trust = stage.trust_remote_code
    models = {"model": locate_model(stage.model, "--model", trust) if stage.model is not None else None}
    if isinstance(stage, TrainPairs):
        reference = stage.ref_model
        models["ref_model"] = None if reference is None else locate_model(reference, "--ref-model", trust)
    splits = find_dataset(stage.dataset, stage.data, Silent())
    return training_request(runtime, with_token_budget(runtime, training, models["model"]), models, splits)
