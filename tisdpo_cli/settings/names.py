"""Names of settings: bare or dotted, in any command, and what was probably meant by a name that is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.commands import leaf_paths
from tisdpo_cli.settings.fields import meta
from tisdpo_cli.settings.run import STAGES, Run

# Options of other trainers that have no like here, and what says it here, or why nothing does.
_ELSEWHERE = {
    "bf16": "--dtype bf16 says that",
    "fp16": "--dtype bf16 is the low precision there is",
    "tf32": "--dtype says what is computed in",
    "torch-dtype": "--dtype says what is computed in",
    "loss-type": "--loss says that; what others call sigmoid is dpo",
    "warmup-ratio": "--warmup-steps says that, in updates",
    "logging-steps": "metrics.jsonl in the output has every update",
    "report-to": "nothing is sent anywhere; metrics.jsonl in the output has every update",
    "run-name": "nothing is sent anywhere; metrics.jsonl in the output has every update",
    "push-to-hub": "nothing is uploaded; hf upload does that",
    "hub-model-id": "nothing is uploaded; hf upload does that",
    "save-strategy": "--save-every says that, in updates",
    "eval-strategy": "--eval-every says that, in updates",
    "evaluation-strategy": "--eval-every says that, in updates",
    "resume-from-checkpoint": "--resume says that",
    "precompute-ref-log-probs": "the reference is always read once; see --no-ref-cache",
    "padding-free": "rows are packed anyway; see --layout",
    "use-liger-kernel": "the head never holds all logits",
    "attn-implementation": "--layout says how rows are read",
    "torch-compile": "there is no compilation",
    "disable-dropout": "dropout is always off",
    "use-peft": "there are no adapters yet",
    "lora-r": "there are no adapters yet",
    "lora-alpha": "there are no adapters yet",
    "lora-target-modules": "there are no adapters yet",
    "load-in-4bit": "there are no adapters yet",
    "fsdp": "there is no sharded training yet",
    "deepspeed": "there is no sharded training yet",
}

# Settings of stages that `run` decides, so that they cannot stand at its top.
_NOT_SHARED = ("init", "forward", "reverse", "scored", "dry_run")


def resolve(command: type[Command], name: str) -> str | None:
    """The dotted name of a setting given by its dotted or its bare name; None where the command has no such."""
    paths = leaf_paths(command)
    if name in paths:
        return name
    bare = next((path for path in paths if path.rpartition(".")[2] == name), None)
    return bare or second_names(command).get(name)


def second_names(command: type[Command]) -> dict[str, str]:
    """Other spellings of settings (`lr`, `per_device_train_batch_size`) to their dotted names."""
    flags = {path: meta(info).get("flags", ()) for path, info in leaf_paths(command).items()}
    return {flag[2:].replace("-", "_"): path for path, some in flags.items() for flag in some if flag.startswith("--")}


def locate(command: type[Command], name: str) -> str | None:
    """Like `resolve`; in `run`, also the settings of stages, and at the top those that any stage has."""
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
    """The name of a setting whatever its case: variables are upper case, and L and U are names."""
    spelled = {name.lower(): name for name in names(command)}.get(lowered)
    return None if spelled is None else locate(command, spelled)


def names(command: type[Command]) -> set[str]:
    """Every name by which a setting of a command can be given."""
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
    """`, did you mean …?` with the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def foreign_option_hint(option: str) -> str | None:
    """What to use in the place of an option of another trainer, given as it was typed; None where it is none."""
    return _ELSEWHERE.get(option.lstrip("-").partition("=")[0].replace("_", "-"))
