"""What a dry run found: lines for people, and one object for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from tisdpo_cli.cli.first_row_view import first_row_lines
from tisdpo_cli.cli.prediction_view import duration, misfits, prediction_lines
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.settings.base import Command, leaf_paths
from tisdpo_cli.settings.fields import meta

if TYPE_CHECKING:
    from tisdpo_cli.engine.dry_run import DryRun
    from tisdpo_cli.engine.pipeline import PipelineDryRun

# Settings that may name the output of another stage.
_READ = ("model", "ref_model", "forward", "reverse", "dataset")
_COLUMNS = ("prompt", "chosen", "rejected")


def show_pipeline(found: PipelineDryRun, reporter: Reporter) -> None:
    """Report what was found of a pipeline: the prediction of each stage, and the first row of the first."""
    for number, (name, stage) in enumerate(found.stages.items()):
        reporter.stage(name.replace("_", "-"))
        show(stage, found.settings[name], reporter, with_row=number == 0)
    if found.stages:
        reporter.stage(f"all stages: about {duration(found.seconds)}")


def pipeline_as_json(found: PipelineDryRun) -> dict[str, Any]:
    """The same as plain values for JSON."""
    plan = {name: {"action": stage.action, "reasons": list(stage.reasons)} for name, stage in found.plan.items()}
    stages = {name: as_json(stage) for name, stage in found.stages.items()}
    for name, stage in stages.items():
        # Others stood in for what is not there yet.
        planned = found.settings[name]
        stage["settings"] |= {path: getattr(planned, path) for path in _READ if hasattr(planned, path)}
    return {"plan": plan, "stages": stages, "seconds": found.seconds}


def show(found: DryRun, settings: Command, reporter: Reporter, with_row: bool = True) -> None:
    """Report what was found.

    Args:
        found: by a dry run.
        settings: of the command.
        reporter: of the command.
        with_row: whether to show the first row.
    """
    in_force = _settings(found)
    changed = _changed(in_force, settings)
    if changed:
        reporter.note("settings other than the defaults: " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    columns = _columns(in_force)
    if columns:
        reporter.note("columns: " + ", ".join(f"{role} = {name!r}" for role, name in columns.items()))
    for split, sizes in found.splits.items():
        if "examples" in sizes:
            spreads = [
                f"{name.replace('_', ' ')} {'/'.join(map(str, sizes[name].values()))}"
                for name in ("prompt_tokens", "response_tokens")
            ]
            reporter.note(f"{split}: {', '.join(spreads)} (median, 95 %, longest)")
    row = [] if found.first_row is None or not with_row else first_row_lines(found.first_row)
    for line in (*prediction_lines(found.prediction), *row):
        reporter.note(line)
    for line in misfits(found.prediction, settings):
        reporter.warn(line)


def as_json(found: DryRun) -> dict[str, Any]:
    """The same as plain values for JSON, with all settings in force."""
    in_force = _settings(found)
    return {"settings": in_force, "columns": _columns(in_force), **found.as_dict()}


def _settings(found: DryRun) -> dict[str, Any]:
    return yaml.safe_load(found.config_yaml) or {}


def _columns(in_force: Mapping[str, Any]) -> dict[str, str]:
    data = in_force.get("data", {})
    return {role: data[f"{role}_column"] for role in _COLUMNS if f"{role}_column" in data}


def _changed(in_force: Mapping[str, Any], settings: Command) -> dict[str, Any]:
    """The settings that differ from their defaults, without the paths that a command line has to name."""
    changed = {}
    for path, info in leaf_paths(type(settings)).items():
        group, _, name = path.partition(".")
        value = in_force.get(group)
        value = value.get(name) if name and isinstance(value, Mapping) else value
        paths = meta(info).get("reads") is not None or path == "dry_run"
        if not info.is_required() and not paths and value != info.default:
            changed[name or group] = value
    return changed
