"""What to change when memory runs out: settings that are in force in this command, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tisdpo_cli.errors import Activity, OutOfMemory, is_out_of_memory
from tisdpo_cli.settings.base import Command

_NEW_MODEL = ("hidden_size", "layers", "vocab_size")


@contextmanager
def explaining_out_of_memory(settings: Command, stage: str = "") -> Iterator[None]:
    """Add what lowers memory to the error of a block that runs out of it.

    Args:
        settings: of the command that the block runs.
        stage: its name in `run`, or empty for a command of its own.

    Raises:
        OutOfMemory: the block ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        known = error if isinstance(error, OutOfMemory) else OutOfMemory()
        if known.fix:
            raise
        fix = memory_advice(settings, known.activity, stage)
        explained = OutOfMemory(known.activity, where=known.where, fix=fix)
        explained.shared = known.shared
        raise explained from error


def memory_advice(settings: Command, activity: Activity, stage: str = "") -> str:
    """What lowers the memory of an activity of a command.

    Args:
        settings: of the command.
        activity: in which memory ran out; empty for the main work of the command.
        stage: as in `explaining_out_of_memory`.
    """
    advice = _Advice({path.rpartition(".")[2]: value for path, _, value in settings.leaves()}, stage)
    if activity == "reading":
        return "free memory, or use fewer or shorter rows"
    if activity == "loading":
        if advice.values.get("init"):
            return f"lower {advice.together([advice.now(name) for name in _NEW_MODEL])}"
        return ", or ".join([*advice.one_model_at_a_time(), "free memory", "use a smaller model"])
    lower = advice.size_of_a_pass(activity)
    if activity == "generating":
        lower.append(advice.now("max_new_tokens"))
    elif "max_length" in advice.values:
        # The stages of `run` must agree on it.
        lower.append(advice.now("max_length", shared=True))
    parts = [f"lower {advice.together(lower)}"] if lower else []
    if activity == "":
        parts += advice.more_passes()
        if advice.values.get("gradient_checkpointing") is False:
            parts.append(f"use {advice.name('gradient_checkpointing')}")
        if advice.values.get("lora_r", 0) is None and not advice.values.get("init"):
            parts.append(f"train an adapter with {advice.name('lora_r')}")
    parts += advice.one_model_at_a_time()
    # An output that was started keeps to its settings.
    again = "; changed settings need --overwrite" if "overwrite" in advice.values else ""
    return ", or ".join(parts or ["free memory, or use fewer rows"]) + again


def change_advice(settings: Command, setting: str, value: object) -> str:
    """How to give a setting another value that lowers memory, as a part of a sentence.

    Args:
        settings: of the command.
        setting: its bare name.
        value: that it should have.
    """
    advice = _Advice({path.rpartition(".")[2]: current for path, _, current in settings.leaves()}, "")
    if value is True:
        return f"use {advice.name(setting)}"
    if setting == "lora_r":
        return f"train an adapter with {advice.name(setting)} {value}"
    if setting == "shard":
        return f"use {advice.name(setting)} {value}"
    verb = "raise" if setting == "gradient_accumulation" else "lower"
    return f"{verb} {advice.now(setting)} to {value}"


@dataclass(frozen=True)
class _Advice:
    """Settings by their bare names, and how to write them in a sentence."""

    values: dict[str, Any]
    stage: str

    def size_of_a_pass(self, activity: Activity) -> list[str]:
        """The setting in force that decides how many rows a forward pass has, if it can be lower."""
        values = self.values
        if "tokens_per_microbatch" not in values:
            size = "batch_size"
        elif activity == "evaluating":
            size = "eval_batch_size"
        elif values["micro_batch_size"] is not None:
            size = "micro_batch_size"
        else:
            return [] if values["gradient_accumulation"] is not None else [self.now("tokens_per_microbatch")]
        return [self.now(size)] if values.get(size, 1) > 1 else []

    def more_passes(self) -> list[str]:
        """More forward passes for a batch, where their number is given."""
        given = self.values.get("gradient_accumulation") is not None
        return [f"raise {self.now('gradient_accumulation')}"] if given else []

    def one_model_at_a_time(self) -> list[str]:
        """Of two models, for commands that can."""
        two_models = self.values.get("sequential") is False and self.values.get("model") is None
        return [f"use {self.name('sequential')}"] if two_models else []

    def name(self, setting: str, shared: bool = False) -> str:
        """The option of a setting; in `run` its name in the file and in `--set`."""
        if self.stage:
            return setting if shared else f"{self.stage}.{setting}"
        return f"--{setting.replace('_', '-')}"

    def now(self, setting: str, shared: bool = False) -> str:
        """The option of a setting and its value, if it has one."""
        value = self.values[setting]
        return f"{self.name(setting, shared)}{'' if value is None else f' (now {value})'}"

    def together(self, parts: list[str]) -> str:
        """`a, b or c`."""
        return " or ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
