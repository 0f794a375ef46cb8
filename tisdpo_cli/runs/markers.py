"""The markers of an output directory: which one this program wrote, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tisdpo_cli.errors import UsageError
from tisdpo_cli.files import PARTIAL, RUN_FILE

STARTED_FILE = ".started.json"
CHECKPOINTS = "checkpoints"
PARTS = ".parts"
LOCK_FILE = ".lock"

# Fields of both markers; that of a finished output says the versions and the files too.
_FIELDS = {"command": str, "made_from": dict}


def read_marker(path: Path) -> dict[str, Any] | None:
    """A marker that this program wrote; None for any other file of its name."""
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        ours = all(isinstance(marker[name], kind) for name, kind in _FIELDS.items())
        if path.name == RUN_FILE:
            ours = ours and "tisdpo" in marker["versions"] and isinstance(marker["files"], list)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return marker if ours else None


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


@dataclass(frozen=True)
class Marker:
    """The marker in an output directory.

    Attributes:
        finished: whether it marks a finished output, or one that was started.
        record: what it holds.
    """

    finished: bool
    record: dict[str, Any]


def marker_in(path: Path) -> Marker | None:
    """The marker in a directory, or None if there is none.

    Raises:
        UsageError: it contains something that tisdpo did not create.
    """
    where = f"--output-dir {path}"
    here = {entry.name for entry in path.iterdir()} - {LOCK_FILE} if path.is_dir() else set()
    name = RUN_FILE if RUN_FILE in here else STARTED_FILE if STARTED_FILE in here else None
    if name is None:
        leftovers = {name for name in here if not name.startswith(PARTIAL)}
        if leftovers:
            raise UsageError(
                f"not empty and not created by tisdpo (contains {sorted(leftovers)[0]})",
                where=where,
                fix="choose another directory",
            )
        return None
    record = read_marker(path / name)
    if record is None:
        what = f"{name} is damaged, or was not written by tisdpo; nothing was removed"
        raise UsageError(what, where=where, fix="choose another directory")
    return Marker(name == RUN_FILE, record)


def changes_since(marker: Marker, path: Path, command: str, made_from: Mapping[str, Any]) -> list[str]:
    """What differs between an output and one that a command would create now, one phrase each."""
    now = {"command": command, "made_from": json.loads(json.dumps(made_from))}
    missing = [name for name in marker.record.get("files", []) if not (path / str(name)).exists()]
    return [*differences(marker.record, now), *([f"{missing[0]} is missing"] if marker.finished and missing else [])]


def refuse_change(path: Path, finished: bool, changes: list[str]) -> UsageError:
    """The error of an output that was created with other settings and is not to be overwritten."""
    return UsageError(
        f"{'created' if finished else 'started'} with different settings or inputs: {'; '.join(changes)}",
        where=f"--output-dir {path}",
        fix="choose another directory, or use --overwrite",
    )


def has_progress(path: Path) -> bool:
    """Whether an unfinished output holds work that could be resumed."""
    return any((path / name).is_dir() and any((path / name).iterdir()) for name in (CHECKPOINTS, PARTS))
