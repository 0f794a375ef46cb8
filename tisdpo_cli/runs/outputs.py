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
from tisdpo_cli.files import CONFIG_FILE, PARTIAL, RUN_FILE, remove, reporting_write_errors, write_json, write_text

STARTED_FILE = ".started.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
PARTS = ".parts"
LOCK_FILE = ".lock"
_WORKING = (RUN_FILE, STARTED_FILE, METRICS_FILE, CHECKPOINTS, PARTS, CONFIG_FILE)

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

    def release(self) -> None:
        """Release the directory for other runs; an empty one is removed."""
        if self._lock is not None:
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
        UsageError: in use by another run, not created by tisdpo, or created with different settings.
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
        output.state, output._stale = "fresh", (CHECKPOINTS, PARTS, METRICS_FILE)
    return output


def _lock(path: Path) -> BaseFileLock:
    where = f"--output-dir {path}"
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


def _state(output: Output, overwrite: bool) -> State:
    here = {entry.name for entry in output.path.iterdir()} - {LOCK_FILE}
    marker = RUN_FILE if RUN_FILE in here else STARTED_FILE if STARTED_FILE in here else None
    if marker is None:
        leftovers = {name for name in here if not name.startswith(PARTIAL)}
        if leftovers:
            raise UsageError(
                f"not empty and not created by tisdpo (contains {sorted(leftovers)[0]})",
                where=f"--output-dir {output.path}",
                fix="choose another directory",
            )
        return "fresh"
    found = _read_marker(output.path / marker)
    changes = differences(found, {"command": output.command, "made_from": output.made_from})
    missing = [name for name in found.get("files", []) if not (output.path / name).exists()]
    if marker == RUN_FILE and missing:
        changes = [*changes, f"{missing[0]} is missing"]
    if not changes:
        return "finished" if marker == RUN_FILE else "started"
    if marker == STARTED_FILE and not _has_progress(output):
        return "fresh"
    if not overwrite:
        verb = "created" if marker == RUN_FILE else "started"
        raise UsageError(
            f"{verb} with different settings or inputs: {'; '.join(changes)}",
            where=f"--output-dir {output.path}",
            fix="choose another directory, or use --overwrite",
        )
    named = [name for name in found.get("files", []) if isinstance(name, str)]
    inside = [name for name in named if Path(name).name == name and name not in (".", "..")]
    output._stale = (*inside, *_WORKING)
    return "fresh"


def _has_progress(output: Output) -> bool:
    return any(folder.is_dir() and any(folder.iterdir()) for folder in (output.checkpoints, output.parts))


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        marker = None
    whole = isinstance(marker, dict) and isinstance(marker.get("made_from"), dict)
    return marker if whole and isinstance(marker.get("files", []), list) else {"command": "damaged"}


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two records of `command` and `made_from`, one phrase each."""
    if was.get("command") != now["command"]:
        return [f"command {was.get('command')} → {now['command']}"]
    old, new = was.get("made_from", {}), now["made_from"]
    changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    # Another transform or objective has other parameters; naming the change of the choice is enough.
    groups = {_group(key) for key in changed if key in old and key in new}
    shown = [key for key in changed if (key in old and key in new) or not _group(key) or _group(key) not in groups]
    return [
        f"the {key} has changed"
        if key.startswith("content of ")
        else f"{key} {_short(old.get(key))} → {_short(new.get(key))}"
        for key in shown
    ]


def _group(key: str) -> str:
    return key.rpartition(".")[0]


def _short(value: Any) -> str:
    # 0.0 and 0 are one value.
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e6
    text = "none" if value is None else str(int(value)) if whole else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def versions() -> dict[str, str]:
    """Versions of tisdpo and of the packages its numbers depend on."""
    packages = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "flash-attn")
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
        with reporting_write_errors(self._path), self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without damaged ones."""
    return [record for _, record in _lines(path)[0]]


def last_metrics(path: Path, step: int) -> dict[str, Any]:
    """The line of a step in a metrics file, if it is the last one; otherwise empty."""
    last = (read_metrics(path) or [{}])[-1]
    return last if last.get("step") == step else {}


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
