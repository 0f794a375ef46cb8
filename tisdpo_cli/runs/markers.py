"""The markers of an output directory: which one this program wrote, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tisdpo_cli.files import RUN_FILE

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
