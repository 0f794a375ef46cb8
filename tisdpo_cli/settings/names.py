"""Names of settings: bare or dotted, in any command; suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tisdpo_cli.settings.base import Command, leaf_paths
from tisdpo_cli.settings.fields import meta
from tisdpo_cli.settings.run import STAGES, Run

# A suggestion must share this much with what was typed: `betta` is beta, `logging_step` is not eval_steps.
_CLOSE = 0.72

# Settings of stages that are not accepted at the top level of `run`: it sets them itself, or they are for one stage.
_NOT_SHARED = ("init", "forward", "reverse", "scored", "dry_run", "push_to_hub")


def resolve(command: type[Command], name: str) -> str | None:
    """The dotted name of a setting given by its dotted or bare name; None if the command has no such setting."""
    paths = leaf_paths(command)
    if name in paths:
        return name
    bare = next((path for path in paths if path.rpartition(".")[2] == name), None)
    return bare or second_names(command).get(name)


def second_names(command: type[Command]) -> dict[str, str]:
    """Other spellings of settings (`lr`, `per_device_train_batch_size`), to their dotted names."""
    flags = {path: meta(info).get("flags", ()) for path, info in leaf_paths(command).items()}
    return {flag[2:].replace("-", "_"): path for path, some in flags.items() for flag in some if flag.startswith("--")}


def locate(command: type[Command], name: str) -> str | None:
    """Like `resolve`; in `run` also the settings of stages, and at the top level those that any stage has."""
    path = resolve(command, name)
    if path is not None or not issubclass(command, Run):
        return path
    stage, _, rest = name.partition(".")
    if stage in STAGES:
        inner = resolve(STAGES[stage], rest) if rest else ""
        return None if inner is None else f"{stage}.{inner}"
    shared = name.rpartition(".")[2] not in _NOT_SHARED and any(resolve(STAGES[s], name) for s in STAGES)
    return name if shared else None


def case(command: type[Command], lowered: str) -> str | None:
    """The name of a setting regardless of case: variables are upper case, and L and U are names."""
    spelled = {name.lower(): name for name in names(command)}.get(lowered)
    return None if spelled is None else locate(command, spelled)


def names(command: type[Command]) -> set[str]:
    """Every accepted name of a setting of a command."""
    known = (
        set(leaf_paths(command))
        | set(second_names(command))
        | {path.rpartition(".")[2] for path in leaf_paths(command)}
    )
    if issubclass(command, Run):
        for stage in STAGES:
            inner = names(STAGES[stage])
            known |= inner | {f"{stage}.{name}" for name in inner}
    return known


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean …?` with the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=_CLOSE)
    return f", did you mean {close[0]}?" if close else ""
