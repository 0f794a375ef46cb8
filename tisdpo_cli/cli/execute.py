"""A command from its options to its result: settings, checks, the engine, and what is printed."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tisdpo_cli.cli.next_command import next_command, repeated_options
from tisdpo_cli.cli.options import Invocation
from tisdpo_cli.cli.process import command_line, is_first_rank
from tisdpo_cli.cli.sharing import share
from tisdpo_cli.cli.signals import check_signals
from tisdpo_cli.cli.streams import make_reporter, write_path, write_result
from tisdpo_cli.errors import DataError
from tisdpo_cli.files import write_lines, write_text
from tisdpo_cli.runs.worker import is_worker
from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.commands import CommandSpec
from tisdpo_cli.settings.inspect_weights import InspectWeights
from tisdpo_cli.settings.memory_advice import explaining_out_of_memory
from tisdpo_cli.settings.schema import json_schema
from tisdpo_cli.settings.sources import load, to_yaml

if TYPE_CHECKING:
    from tisdpo_cli.engine.curves.results import RunComparison
    from tisdpo_cli.engine.evaluation.results import Evaluation
    from tisdpo_cli.engine.inspection.results import Inspection
    from tisdpo_cli.engine.pipeline import PipelineResult
    from tisdpo_cli.reporter import Reporter
    from tisdpo_cli.runs.stage import StageResult
    from tisdpo_cli.settings.translation import Translation


def execute(spec: CommandSpec, typed: Invocation) -> None:
    """Run a command and print its result.

    Raises:
        TisdpoError: anything the user can fix.
        Interrupted: by a signal.
    """
    if typed.schema:
        write_result(json.dumps(json_schema(spec.settings), indent=2, ensure_ascii=False))
        return
    # `env` shows the variables, unknown ones too.
    environ = {} if spec.shows == "environment" else os.environ
    loaded = load(
        spec.settings,
        typed.flags,
        config=typed.config,
        sets=typed.sets,
        environ=environ,
        further=typed.further,
        faults=typed.faults,
    )
    typed = replace(typed, flags=loaded.flags)
    if typed.print_config:
        _tell(make_reporter(), loaded.notices)
        write_result(to_yaml(loaded.settings, loaded.origins).rstrip("\n"))
        return
    from tisdpo_cli.cli.preflight import check

    check(loaded.settings)
    processes = getattr(loaded.settings, "num_processes", 1)
    # A dry run plans for processes that need not be there.
    if processes > 1 and not is_worker() and not getattr(loaded.settings, "dry_run", False):
        from tisdpo_cli.runs.launch import launch

        # This very command, whose processes do and say the rest.
        launch(processes, sys.argv[1:])
        return
    reporter = make_reporter()
    _tell(reporter, loaded.notices)
    module, _, function = spec.run.partition(":")
    entry_point = getattr(importlib.import_module(f"tisdpo_cli.{module}"), function)
    # An entry point takes what it needs, by name.
    offered = {"settings": loaded.settings, "reporter": reporter, "command": command_line()}
    taken = inspect.signature(entry_point).parameters
    check_signals()
    with explaining_out_of_memory(loaded.settings):
        result = entry_point(**{name: value for name, value in offered.items() if name in taken})
        check_signals()
        dry_run = getattr(loaded.settings, "dry_run", False)
        if not dry_run:
            share(loaded.settings, reporter)
        show = _show_dry_run if dry_run else _SHOW[spec.shows]
        show(result, spec, loaded.settings, typed, reporter)


def _tell(reporter: Reporter, notices: Iterable[str]) -> None:
    for notice in notices:
        reporter.note(notice)


def _show_path(
    result: StageResult, spec: CommandSpec, settings: Command, typed: Invocation, reporter: Reporter
) -> None:
    if not is_first_rank():
        return
    if spec.next is not None:
        reporter.command("next", next_command(spec, settings, typed.flags, typed.config, typed.sets))
    record = {"path": str(result.path), **result.record}
    if typed.as_json:
        write_result(json.dumps(record))
    else:
        write_path(result.path)


def _show_dry_run(result: Any, spec: CommandSpec, settings: Command, typed: Invocation, reporter: Reporter) -> None:
    """What a dry run found; there is no output."""
    from tisdpo_cli.cli.dry_run_view import as_json, pipeline_as_json, show, show_pipeline

    if not is_first_rank():
        return
    if spec.shows == "pipeline":
        show_pipeline(result, reporter)
        found = pipeline_as_json(result)
    else:
        dry_run = result if spec.shows == "evaluation" else result.dry_run
        show(dry_run, settings, reporter)
        found = as_json(dry_run)
    if typed.as_json:
        write_result(json.dumps({"dry_run": True, "command": settings.command, **found}))


def _show_inspection(
    result: Inspection, _spec: CommandSpec, settings: Any, typed: Invocation, reporter: Reporter
) -> None:
    from tisdpo_cli.cli.inspection_view import picture, render
    from tisdpo_cli.engine.inspection.report.page import page
    from tisdpo_cli.engine.inspection.report.table import origin, table

    for notice in result.notices:
        reporter.warn(notice)
    files: dict[str | None, Callable[[], Iterable[str]]] = {
        settings.svg: lambda: [picture(result)],
        settings.html: lambda: [page(result)],
        settings.table: lambda: table(result),
        settings.table and f"{settings.table}.json": lambda: [origin(result)],
    }
    for path, lines in files.items():
        if path is not None:
            write_lines(Path(path).expanduser(), lines())
            reporter.note(f"wrote {path}")
    if typed.as_json:
        write_result(json.dumps(result.as_dict(), ensure_ascii=True))
    else:
        write_result(render(result, settings.limit or 1))
    failed = [check.name for check in result.checks if not check.passed]
    if settings.check and failed:
        raise DataError(f"{len(failed)} checks failed: {', '.join(failed)}", where=settings.scored)


def _show_evaluation(
    result: Evaluation, _spec: CommandSpec, _settings: Command, typed: Invocation, _reporter: Reporter
) -> None:
    from tisdpo_cli.cli.evaluation_view import render

    if not is_first_rank():
        return
    write_result(json.dumps(result.as_dict()) if typed.as_json else render(result))


def _show_pipeline(
    result: PipelineResult, _spec: CommandSpec, settings: Any, typed: Invocation, reporter: Reporter
) -> None:
    from tisdpo_cli.cli.inspection_view import pair_view, picture
    from tisdpo_cli.cli.pipeline_view import stage_rows, stage_table
    from tisdpo_cli.engine.inspection.report.page import page

    if not is_first_rank():
        return
    inspection = result.inspection
    for notice in inspection.notices:
        reporter.warn(notice)
    reporter.stage("token weights")
    reporter.note(f"weights: {inspection.transform}")
    reporter.show(pair_view(inspection))
    reporter.stage("results")
    reporter.show(stage_table(result))
    write_text(result.path / "report.svg", picture(inspection, stage_table(result)))
    write_text(result.path / "report.html", page(inspection, stage_rows(result)))
    reporter.note(f"report: {result.path / 'report.html'}, and as an image {result.path / 'report.svg'}")
    weights = settings.inspect_weights.weights.model_dump(exclude_defaults=True)
    options = repeated_options(InspectWeights, {f"weights.{name}": value for name, value in weights.items()})
    reporter.command("next", f"tisdpo inspect-weights {shlex.quote(inspection.source)}{options}")
    if typed.as_json:
        write_result(json.dumps(result.as_dict()))
    else:
        write_path(result.path)


def _show_curves(
    result: RunComparison, _spec: CommandSpec, settings: Any, typed: Invocation, _reporter: Reporter
) -> None:
    from tisdpo_cli.engine.curves.page import page

    path = Path(settings.output).expanduser()
    write_text(path, page(result))
    if typed.as_json:
        write_result(json.dumps({"path": str(path), **result.as_dict()}))
    else:
        write_path(path)


def _show_translation(
    result: Translation, _spec: CommandSpec, settings: Any, typed: Invocation, reporter: Reporter
) -> None:
    command_line = "" if settings.yaml and not typed.as_json else result.command_line()
    _tell(reporter, result.notices)
    if typed.as_json:
        values = {path: value for path, value in result.settings.items() if path != "dataset"}
        write_result(json.dumps({"command_line": command_line, "settings": values, "notices": result.notices}))
    else:
        write_result(result.yaml() if settings.yaml else command_line)


def _show_environment(
    result: dict[str, str], _spec: CommandSpec, _settings: Command, typed: Invocation, _reporter: Reporter
) -> None:
    from tisdpo_cli.cli.environment_view import lines, variables

    found = {**result, **variables(os.environ)}
    write_result(json.dumps(found) if typed.as_json else lines(found))


_SHOW: dict[str, Callable[..., None]] = {
    "path": _show_path,
    "inspection": _show_inspection,
    "evaluation": _show_evaluation,
    "pipeline": _show_pipeline,
    "curves": _show_curves,
    "translation": _show_translation,
    "environment": _show_environment,
}
