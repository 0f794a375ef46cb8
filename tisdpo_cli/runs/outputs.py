"""The output directory: claimed by one run, and finished by a marker that is written last. Knows no engine.

`run.json` marks it as finished. `.started.json` records the settings and inputs of an unfinished one, so that resuming
with different ones is refused.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from filelock import BaseFileLock, FileLock, Timeout

from tisdpo_cli import __version__
from tisdpo_cli.errors import TrainingError, UsageError
from tisdpo_cli.files import (
    CONFIG_FILE,
    PARTIAL,
    RUN_FILE,
    remove,
    remove_partials,
    reporting_write_errors,
    write_json,
    write_text,
)
from tisdpo_cli.runs.markers import (
    CHECKPOINTS,
    LOCK_FILE,
    PARTS,
    STARTED_FILE,
    changes_since,
    has_progress,
    marker_in,
    refuse_change,
)

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TRACKERS_DIRECTORY = "trackers"
_WORKING = (RUN_FILE, STARTED_FILE, METRICS_FILE, CHECKPOINTS, PARTS, CONFIG_FILE, SAMPLES_FILE, TRACKERS_DIRECTORY)

State = Literal["fresh", "started", "finished"]


@dataclass
class Output:
    """A claimed output directory.

    Attributes:
        state: `fresh` (empty), `started` (an earlier run with the same settings did not finish), `finished` (created
            with the same settings).
        made_from: settings and input hashes that shape the result.
    """

    path: Path
    command: str
    made_from: dict[str, Any]
    state: State = "fresh"
    _stale: tuple[str, ...] = ()
    _lock: BaseFileLock | None = field(default=None, repr=False)
    _started: bool = False

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def checkpoints(self) -> Path:
        """The checkpoint directory."""
        return self.path / CHECKPOINTS

    @property
    def parts(self) -> Path:
        """Where `estimate` saves finished work until the dataset is written."""
        return self.path / PARTS

    def start(self, config_yaml: str) -> None:
        """Remove what is replaced and record what is being created; called after all checks."""
        if self._stale:
            # The marker goes first: a kill in between leaves an unfinished output, never a torn one.
            remove(self.path / RUN_FILE)
        for name in self._stale:
            remove(self.path / name)
        self._started = True
        self._remove_partials()
        write_json(self.path / STARTED_FILE, {"command": self.command, "made_from": self.made_from})
        write_text(self.path / CONFIG_FILE, config_yaml)

    def publish(self, staged: Path) -> list[str]:
        """Move the files of the staging directory into place; returns their names."""
        names = sorted(entry.name for entry in staged.iterdir())
        for name in names:
            if (self.path / name).is_dir():
                remove(self.path / name)
            (staged / name).replace(self.path / name)
        staged.rmdir()
        return names

    def staging(self) -> Path:
        """An empty directory inside the output where the result is written before it is published."""
        staged = self.path / f"{PARTIAL}output"
        remove(staged)
        staged.mkdir()
        return staged

    def finish(self, record: Mapping[str, Any], files: list[str]) -> None:
        """Write the completion marker, the last write to an output."""
        write_json(
            self.path / RUN_FILE,
            {"command": self.command, "versions": versions(), **record, "made_from": self.made_from, "files": files},
        )
        (self.path / STARTED_FILE).unlink(missing_ok=True)
        remove(self.path / PARTS)

    def record(self) -> dict[str, Any]:
        """`run.json` of a finished output."""
        return json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))

    def without_lock(self) -> Output:
        """A copy for a process that does not hold the lock."""
        return Output(self.path, self.command, self.made_from, self.state)

    def _remove_partials(self) -> None:
        for directory in (self.path, self.parts):
            remove_partials(directory)

    def release(self) -> None:
        """Release the directory for other runs; temporary files are removed, and the directory if it is empty."""
        if self._lock is not None:
            if self._started:
                with suppress(OSError):
                    self._remove_partials()
            # Windows keeps a file that is open; the lock removes its own there.
            with suppress(PermissionError):
                (self.path / LOCK_FILE).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None
            with suppress(OSError):
                self.path.rmdir()


def claim(path: Path, command: str, made_from: Mapping[str, Any], *, overwrite: bool, restart: bool = False) -> Output:
    """Claim an output directory for this run.

    Args:
        path: the directory; created if it does not exist.
        command: the command that creates the output.
        made_from: settings and input hashes that shape the result (JSON-able).
        overwrite: replace an output created with different settings, once the run starts.
        restart: discard the progress of an unfinished run instead of resuming it, once the run starts.

    Raises:
        UsageError: in use by another run, not created by tisdpo, created with different settings, or with a symbolic
            link where this run would write.
        TrainingError: it cannot be created or written.
    """
    output = Output(path, command, json.loads(json.dumps(made_from)))
    output._lock = _lock(path)
    try:
        output.state = _state(output, overwrite)
    except BaseException:
        output.release()
        raise
    if output.state == "started" and restart:
        output.state, output._stale = "fresh", (CHECKPOINTS, PARTS, METRICS_FILE, SAMPLES_FILE, TRACKERS_DIRECTORY)
    return output


def _lock(path: Path) -> BaseFileLock:
    where = f"--output-dir {path}"
    refuse_links(path)
    if path.exists() and not path.is_dir():
        raise UsageError("is a file, not a directory", where=where)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Not thread-local: signal handlers and finalizers may release it.
        lock = FileLock(path / LOCK_FILE, timeout=0, thread_local=False)
        lock.acquire()
    except Timeout as fault:
        raise UsageError(
            "in use by another run", where=where, fix="wait for it, or choose another directory"
        ) from fault
    except OSError as fault:
        raise TrainingError(f"cannot be written: {fault.strerror}", where=where) from fault
    return lock


def refuse_links(path: Path) -> None:
    """Refuse an output directory that leads nowhere, or that contains links where a run writes.

    Raises:
        UsageError: there is such a link.
    """
    where = f"--output-dir {path}"
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            name = "" if place == path else f"{place.name} "
            what = f"{name}is a dangling symbolic link to {place.readlink()}"
            raise UsageError(what, where=where, fix="create that directory, or remove the link")
    for name in (*_WORKING, LOCK_FILE):
        if (path / name).is_symlink():
            what = f"contains a symbolic link, {name}, which is never written through"
            raise UsageError(what, where=where, fix="remove it, or choose another directory")


def _state(output: Output, overwrite: bool) -> State:
    marker = marker_in(output.path)
    if marker is None:
        return "fresh"
    changes = changes_since(marker, output.path, output.command, output.made_from)
    if not changes:
        return "finished" if marker.finished else "started"
    if not marker.finished and not has_progress(output.path):
        return "fresh"
    if not overwrite:
        raise refuse_change(output.path, marker.finished, changes)
    named = [name for name in marker.record.get("files", []) if isinstance(name, str)]
    inside = [name for name in named if Path(name).name == name and name not in (".", "..")]
    output._stale = (*inside, *_WORKING)
    return "fresh"


def versions() -> dict[str, str]:
    """Versions of tisdpo and of the packages its numbers depend on."""
    packages = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft", "flash-attn")
    found = {name: _version(name) for name in packages}
    return {"tisdpo": __version__, "python": platform.python_version(), **found}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class MetricsFile:
    """`metrics.jsonl`: one flat object per line, flushed as it is written."""

    def __init__(self, path: Path, resume_step: int | None, warn: Callable[[str], None]) -> None:
        """Open for appending; on resume drop lines after `resume_step` and damaged ones, otherwise all."""
        kept: list[str] = []
        if resume_step is not None:
            lines, damaged = _lines(path)
            kept = [line for line, record in lines if record["step"] <= resume_step]
            if damaged:
                rest = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
                warn(f"{path}:{damaged[0]}{rest}: damaged, dropped from the metrics")
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        with reporting_write_errors(self._path), self._path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without damaged ones."""
    return [record for _, record in _lines(path)[0]]


def last_metrics(path: Path, step: int) -> dict[str, Any]:
    """The line of a step in a metrics file, if it is the last one; otherwise empty."""
    last = (read_metrics(path) or [{}])[-1]
    return last if last.get("step") == step else {}


def metrics_of(path: Path, step: int) -> dict[str, Any]:
    """The line of a step in a metrics file; empty if there is none."""
    return next((record for record in read_metrics(path) if record["step"] == step), {})


def _lines(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[int]]:
    """The lines of a metrics file with their records, and the numbers of those that are damaged.

    A killed run may leave its last line torn, and a disk may damage any.
    """
    lines: list[tuple[str, dict[str, Any]]] = []
    damaged: list[int] = []
    content = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            text = line.decode("utf-8")
            record = json.loads(text)
            if type(record["step"]) is not int:
                raise ValueError("not a step")
            lines.append((text, record))
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
    return lines, damaged


def apply_umask(paths: list[Path]) -> None:
    """Give files the permissions of the umask; safetensors makes them readable by the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        if path.is_file():
            path.chmod(0o666 & ~mask)
