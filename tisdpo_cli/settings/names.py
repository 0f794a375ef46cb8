"""Names of settings: bare or dotted, in any command; suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tisdpo_cli.settings.base import Command, leaf_paths
from tisdpo_cli.settings.fields import meta
from tisdpo_cli.settings.run import STAGES, Run

# Options of other trainers without an equivalent of the same form, and what to do instead.
_FOREIGN_OPTIONS = {
    "bf16": "use --dtype bf16",
    "fp16": "fp16 is not supported; use --dtype bf16",
    "tf32": "use --dtype",
    "torch-dtype": "use --dtype",
    "loss-type": "use --loss; sigmoid is called dpo",
    "warmup-ratio": "use --warmup-steps, a number of steps",
    "logging-steps": "every step is in metrics.jsonl in the output directory",
    "push-to-hub": "use hf upload",
    "hub-model-id": "use hf upload",
    "save-strategy": "use --save-every, a number of steps",
    "eval-strategy": "use --eval-every, a number of steps",
    "evaluation-strategy": "use --eval-every, a number of steps",
    "resume-from-checkpoint": "use --resume",
    "dataset-config": "use --dataset NAME:CONFIG",
    "precompute-ref-log-probs": "reference log-probs are always precomputed; see --no-ref-cache",
    "padding-free": "rows are packed by default; see --layout",
    "use-liger-kernel": "the head is chunked by default",
    "attn-implementation": "use --layout",
    "torch-compile": "torch.compile is not supported",
    "disable-dropout": "dropout is always off",
    "use-peft": "use --lora-r, the rank of the adapter",
    "lora-task-type": "an adapter is always one of a causal language model",
    "load-in-8bit": "use --load-in-4bit",
    "bnb-4bit-quant-type": "nf4 is the only type; see --load-in-4bit",
    "use-bnb-nested-quant": "double quantization is always on; see --load-in-4bit",
    "fsdp": "use --shard full, which is FSDP2",
    "deepspeed": "use --shard full, which is FSDP2",
}

# Settings of stages that `run` sets itself, so that they are not accepted at its top level.
_NOT_SHARED = ("init", "forward", "reverse", "scored", "dry_run")


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
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def foreign_option_hint(option: str) -> str | None:
    """What to use instead of an option of another trainer, given as typed; None if it is unknown."""
    return _FOREIGN_OPTIONS.get(option.lstrip("-").partition("=")[0].replace("_", "-"))
