"""report: reads the outputs of trainings, finished or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tisdpo_cli.engine.curves.results import RunComparison, RunCurves
from tisdpo_cli.errors import UsageError
from tisdpo_cli.files import CONFIG_FILE, RUN_FILE, near_matches
from tisdpo_cli.runs.markers import read_marker
from tisdpo_cli.runs.outputs import METRICS_FILE, STARTED_FILE, read_metrics
from tisdpo_cli.settings.report import Report
from tisdpo_cli.settings.wiring import stage_directories
from tisdpo_cli.settings.yaml_files import read_yaml

# Settings in which runs always differ, or that shape no result.
_ASIDE = ("output_dir", "overwrite", "dry_run", "profile", "checkpoints.", "hub.")


def report(settings: Report) -> RunComparison:
    """Run report.

    Raises:
        UsageError: a path has no metrics, or the library that draws is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UsageError("report needs matplotlib", fix="pip install 'tisdpo[report]'")
    order = stage_directories()
    paths = [path for name in settings.runs for path in _runs_in(name, order)]
    return RunComparison([_read(path, _flat(_config(path))) for path in dict.fromkeys(paths)])


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path / CONFIG_FILE)
    except UsageError:  # a run that is about to start, or an edited file: its curves are there all the same
        return {}


# Below this line there are no settings ----------------------------------------------------------------------------


def _runs_in(name: str, order: tuple[str, ...]) -> list[Path]:
    """The outputs of trainings that a path names: itself, or the stages of a pipeline, in the given order."""
    path = Path(name).expanduser()
    if not path.is_dir():
        raise UsageError(f"no such directory{near_matches(path, directories=True)}", where=name)
    if (path / METRICS_FILE).is_file():
        return [path]
    stages = [path / stage for stage in order if (path / stage / METRICS_FILE).is_file()]
    if not stages:
        raise UsageError(
            f"no {METRICS_FILE} here", where=name, fix="name the output directory of a training, or of tisdpo run"
        )
    return stages


def _read(path: Path, settings: Mapping[str, Any]) -> RunCurves:
    finished = read_marker(path / RUN_FILE)
    marker = finished or read_marker(path / STARTED_FILE) or {}
    # A run that goes on after a checkpoint may repeat steps that a reader sees in between.
    by_step = {record["step"]: record for record in read_metrics(path / METRICS_FILE)}
    metrics = [by_step[step] for step in sorted(by_step)]
    return RunCurves(
        name=str(path),
        command=str(marker.get("command", "")),
        finished=finished is not None,
        step=metrics[-1]["step"] if metrics else 0,
        settings={name: value for name, value in settings.items() if not name.startswith(_ASIDE)},
        metrics=metrics,
    )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_leaves(values, ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
