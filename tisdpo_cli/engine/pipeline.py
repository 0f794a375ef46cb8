"""run: every stage of the method, one after the other; a stage that is finished with these settings is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tisdpo_cli.engine.dry_run import DryRun
from tisdpo_cli.engine.inspection.inspect_weights import inspect_weights
from tisdpo_cli.engine.inspection.results import Inspection
from tisdpo_cli.engine.pipeline_plan import PipelinePlan, StagePlan, shown
from tisdpo_cli.engine.scoring.estimate import estimate
from tisdpo_cli.engine.stand_ins import StandIns
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.engine.training.sft import train_sft
from tisdpo_cli.files import temporary_directory
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.stage import StageResult, finished_stage
from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.estimate import Estimate
from tisdpo_cli.settings.memory_advice import explaining_out_of_memory
from tisdpo_cli.settings.run import Run
from tisdpo_cli.settings.train_pairs import TrainPairs
from tisdpo_cli.settings.train_sft import TrainSft

_TITLES = {
    "train_sft": "starting model (SFT)",
    "train_dpo": "forward contrastive model π⁺ (DPO)",
    "train_reverse": "reverse contrastive model π⁻ (DPO, pairs swapped)",
    "sft_chosen": "positive contrastive model π⁺ (SFT on chosen)",
    "sft_rejected": "negative contrastive model π⁻ (SFT on rejected)",
    "estimate": "token scores r = log π⁺ − log π⁻",
    "train": "policy with the token-weighted loss (TIS-DPO)",
}


@dataclass(frozen=True)
class PipelineResult:
    """The result of `run`: each stage, and the inspection of the scores."""

    path: Path
    stages: dict[str, StageResult]
    inspection: Inspection

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        stages = {
            name: {"path": str(made.path), "made": made.fresh, **made.record} for name, made in self.stages.items()
        }
        return {"path": str(self.path), "stages": stages}


@dataclass(frozen=True)
class PipelineDryRun:
    """What a dry run of `run` found.

    Attributes:
        plan: what would be done with each stage.
        settings: of the stages that would be made.
        stages: what a dry run of each of them found.
    """

    plan: Mapping[str, StagePlan]
    settings: Mapping[str, Command]
    stages: Mapping[str, DryRun]

    @property
    def seconds(self) -> float:
        """About how long all stages take."""
        return sum(sum(found.prediction.seconds.values()) for found in self.stages.values())


def run(settings: Run, reporter: Reporter, command: str | None = None) -> PipelineResult | PipelineDryRun:
    """Run the pipeline; finished stages are skipped, an interrupted one is resumed, what has changed is redone.

    Args:
        settings: of every stage.
        reporter: receives notes and progress.
        command: the command line, for the provenance of the report.

    Raises:
        TisdpoError: raised by a stage.
    """
    plan = PipelinePlan(settings)
    runtime = Runtime(reporter, plan.sharding())
    runtime.reporter.note("what is done with each stage:")
    planned = runtime.on_main(lambda: plan.all(runtime))
    for name, todo in planned.items():
        runtime.reporter.note(f"  {shown(name)}: {todo}")
    if settings.dry_run:
        return _dry_run(settings, plan, planned, reporter)
    stages: dict[str, StageResult] = {}
    for number, (name, stage) in enumerate(plan.stages.items(), start=1):
        reporter.stage(f"{number}/{len(plan.stages)} {shown(name)}: {_TITLES[name]}")
        with explaining_out_of_memory(stage, name):
            stages[name] = _made(plan, name, planned[name], runtime, reporter)
    with explaining_out_of_memory(settings.inspect_weights, "inspect_weights"):
        inspection = inspect_weights(settings.inspect_weights, command)
    return PipelineResult(Path(settings.output_dir), stages, inspection)


def _dry_run(settings: Run, plan: PipelinePlan, planned: Mapping[str, StagePlan], reporter: Reporter) -> PipelineDryRun:
    """A dry run of every stage that would be made, with stand-ins for what the ones before it would make."""
    missing = {name: todo.action != "skip" for name, todo in planned.items()}
    used: dict[str, Command] = {}
    found: dict[str, DryRun] = {}
    with temporary_directory("tisdpo-dry-run-") as directory:
        stand_ins = StandIns(plan.stages, Path(directory))
        for name in (name for name in plan.stages if missing[name]):
            reporter.stage(f"{shown(name)}: {_TITLES[name]}")
            used[name] = plan.stages[name]
            stage = stand_ins.settings(name, missing).with_values({"num_processes": settings.num_processes})
            if name == "train" and missing["estimate"]:
                reporter.note("there are no scores yet: the rows to be scored stand in, without weights")
            found[name] = _stage(stage, reporter).dry_run
    return PipelineDryRun(planned, used, found)


def _made(plan: PipelinePlan, name: str, planned: StagePlan, runtime: Runtime, reporter: Reporter) -> StageResult:
    """The result of a stage, made now unless it is finished; what it reads is there by now."""
    stage = plan.stages[name]
    if planned.depends:
        planned = runtime.on_main(lambda: plan.of(name, runtime))
    if planned.action == "skip":
        runtime.on_main(lambda: plan.adopt(name))
        return finished_stage(runtime, Path(stage.output_dir), stage.command)  # type: ignore[attr-defined]
    if planned.action == "redo":
        runtime.reporter.note(str(planned))
        stage = stage.with_values({"overwrite": True})
    runtime.on_main(lambda: plan.remember(name, finished=False))
    result = _stage(stage, reporter)
    runtime.on_main(lambda: plan.remember(name, finished=True))
    return result


def _stage(settings: Command, reporter: Reporter) -> StageResult:
    if isinstance(settings, TrainSft):
        return train_sft(settings, reporter)
    if isinstance(settings, Estimate):
        return estimate(settings, reporter)
    assert isinstance(settings, TrainPairs)
    return train_pairs(settings, reporter)
