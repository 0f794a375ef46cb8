"""Trackers of experiments, by accelerate's classes: they get the metrics of a run as it goes, where they are asked for.

What a tracker calls the run is kept in the output directory, so that a resumed run goes on as the same one, and gets no
step twice. Imports nothing heavy at the top: what is missing is said before anything is loaded.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tisdpo_cli.errors import TrainingError, UsageError
from tisdpo_cli.files import remove, write_json

DEFAULT_PROJECT = "tisdpo"
_STATE = "runs.json"
_WANDB_HOST = "https://api.wandb.ai"


@dataclass(frozen=True)
class RunIdentity:
    """What trackers call a run.

    Attributes:
        name: shown to people.
        project: what groups runs.
        id: a text that no other run has.
        directory: where trackers may write.
        first: the first step that this part of the run logs.
    """

    name: str
    project: str
    id: str
    directory: Path
    first: int

    @property
    def file_name(self) -> str:
        """The name without what cannot be in the name of a directory."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "run"


@dataclass(frozen=True)
class TrackerKind:
    """A tracker that can be asked for.

    Attributes:
        install: what to install.
        arguments: of accelerate's class, from an identity and the id that the tracker itself gave to the run before.
        own_id: the id that a started tracker gave to the run, if it gives one.
        forgets: whether it drops what was logged from the first step of a resumed run on, rather than keep it.
        problem: what is missing besides the package, and how to fix it.
    """

    install: str
    arguments: Callable[[RunIdentity, str | None], dict[str, Any]]
    own_id: Callable[[Any], str | None] = lambda _: None
    forgets: bool = False
    problem: Callable[[Mapping[str, str]], tuple[str, str] | None] = lambda _: None


def _wandb_problem(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Without a key wandb would ask for one."""
    if environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or environ.get("WANDB_API_KEY"):
        return None
    host = urlsplit(environ.get("WANDB_BASE_URL") or _WANDB_HOST).hostname
    for path in [environ["NETRC"]] if "NETRC" in environ else ["~/.netrc", "~/_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(Path(path).expanduser())).authenticators(host or ""):
                return None
    return "wandb has no API key", "set WANDB_MODE=offline, set WANDB_API_KEY, or run `wandb login`"


TRACKERS: Mapping[str, TrackerKind] = {
    "tensorboard": TrackerKind(
        "'tisdpo[tensorboard]'",
        lambda run, _: {
            "run_name": run.file_name,
            "logging_dir": str(run.directory / "tensorboard"),
            "purge_step": run.first,
        },
        forgets=True,
    ),
    "wandb": TrackerKind(
        "wandb",
        lambda run, _: {
            "run_name": run.project,
            "name": run.name,
            "id": run.id,
            "resume": "allow",
            "dir": str(run.directory),
            # Its messages would go between those of the run.
            "settings": {"console": "off", "silent": True},
        },
        problem=_wandb_problem,
    ),
    "mlflow": TrackerKind(
        "mlflow",
        lambda run, own: {"experiment_name": run.project, "run_name": run.name, "run_id": own},
        own_id=lambda tracker: tracker.tracker.info.run_id,
    ),
    "trackio": TrackerKind(
        "trackio",
        # It knows runs by their names alone.
        lambda run, _: {"run_name": run.project, "name": f"{run.name}-{run.id}", "resume": "allow", "embed": False},
    ),
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot run, before anything else is done.

    Raises:
        UsageError: a package is missing, or the tracker would ask for a key.
    """
    for name in names:
        kind, where = TRACKERS[name], f"--report-to {name}"
        if find_spec(name) is None:
            raise UsageError(f"needs the package {name}", where=where, fix=f"pip install {kind.install}")
        problem = kind.problem(os.environ)
        if problem is not None:
            what, fix = problem
            raise UsageError(what, where=where, fix=fix)


@dataclass(frozen=True)
class TrackerConfig:
    """The trackers of a run.

    Attributes:
        names: of the trackers, from `TRACKERS`.
        run_name: shown to people.
        project: what groups runs.
        directory: where they may write, and where their ids are kept.
        settings: the settings of the run by dotted name.
    """

    names: Sequence[str]
    run_name: str
    project: str
    directory: Path
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Active:
    """A started tracker, and the last step that it has got."""

    name: str
    tracker: Any
    after: int


class Trackers:
    """The running trackers of a run; one that fails is left with a warning."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._active: list[_Active] = []
        self._warn = warn

    def add(self, name: str, tracker: Any, after: int) -> None:
        """Take a started tracker, which has got every step up to one."""
        self._active.append(_Active(name, tracker, after))

    def log(self, record: Mapping[str, Any]) -> None:
        """Send one line of metrics, unless it has been sent before."""
        values = {name: value for name, value in record.items() if name != "step"}
        for active in list(self._active):
            if record["step"] > active.after:
                self._try(active, partial(active.tracker.log, values, step=record["step"]))

    def close(self) -> None:
        """Finish the run of every tracker."""
        for active in list(self._active):
            self._try(active, active.tracker.finish)

    def _try(self, active: _Active, work: Callable[[], Any]) -> None:
        try:
            with _stdout_kept():
                work()
        except Exception as fault:
            self._active.remove(active)
            self._warn(
                f"--report-to {active.name} has failed and is left: {_line(fault)}; metrics.jsonl has every step"
            )


def start_trackers(
    config: TrackerConfig, resume_step: int | None, logged: Sequence[Mapping[str, Any]], warn: Callable[[str], None]
) -> Trackers:
    """Start the trackers of a run, or let them go on.

    A tracker that is new in a resumed run gets the steps before first.

    Args:
        config: which trackers.
        resume_step: the step that the run resumes after, or None if it starts.
        logged: the lines of metrics that there are from before, later ones than `resume_step` included.
        warn: called when one fails later.

    Raises:
        TrainingError: one does not start.
    """
    if resume_step is None:
        remove(config.directory)
    state = _State(config.directory / _STATE)
    kept = [record for record in logged if resume_step is not None and record["step"] <= resume_step]
    trackers = Trackers(warn)
    for name in config.names:
        resumed = resume_step is not None and name in state.runs
        known = state.runs.setdefault(name, {"id": secrets.token_hex(4), "name": config.run_name})
        first = resume_step + 1 if resumed and resume_step is not None else 0
        identity = RunIdentity(known["name"], config.project, known["id"], config.directory, first)
        # A run that repeats steps may be killed before it has come as far as the one before.
        known["logged"] = max([known.get("logged", -1), *(record["step"] for record in logged)]) if resumed else -1
        # Written before: a run that is killed while it starts keeps its name.
        state.write()
        tracker = _started(name, identity, known.get("own_id"), {} if resumed else config.settings)
        known["own_id"] = TRACKERS[name].own_id(tracker)
        state.write()
        trackers.add(name, tracker, first - 1 if TRACKERS[name].forgets else known["logged"])
        if not resumed:
            for record in kept:
                trackers.log(record)
    return trackers


def _started(name: str, identity: RunIdentity, own_id: str | None, settings: Mapping[str, Any]) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    try:
        with _stdout_kept():
            tracker = LOGGER_TYPE_TO_CLASS[name](**TRACKERS[name].arguments(identity, own_id))
            tracker.start()
            if settings:
                tracker.store_init_configuration(dict(settings))
    except Exception as fault:
        raise TrainingError(
            f"does not start: {_line(fault)}", where=f"--report-to {name}", fix="leave it out"
        ) from fault
    return tracker


class _State:
    """What trackers call the run, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.runs: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError):
            self.runs = json.loads(path.read_text(encoding="utf-8"))

    def write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self.runs)


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Some trackers print; stdout is for the result of the command."""
    with redirect_stdout(sys.stderr):
        yield


def _line(fault: Exception) -> str:
    lines = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__
