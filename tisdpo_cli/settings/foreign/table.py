"""The table of all foreign options, and values of other trainers for settings that exist here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from tisdpo_cli.settings.foreign.axolotl import AXOLOTL
from tisdpo_cli.settings.foreign.llama_factory import LLAMA_FACTORY
from tisdpo_cli.settings.foreign.rules import Outcome, Rule, is_off, number_of, plain
from tisdpo_cli.settings.foreign.transformers import TRANSFORMERS
from tisdpo_cli.settings.foreign.trl import LOSSES, TRL
from tisdpo_cli.settings.names import names
from tisdpo_cli.settings.run import Run

EVERY = {**AXOLOTL, **LLAMA_FACTORY, **TRL, **TRANSFORMERS}

_DTYPES = {"bfloat16": "bf16", "fp32": "float32", "torch.bfloat16": "bf16", "torch.float32": "float32"}


def without_settings(table: Mapping[str, Rule], settings: Iterable[str]) -> dict[str, Rule]:
    """The entries that no setting has the name of: a setting of its own takes the place of an entry."""
    own = set(settings)
    return {name: rule for name, rule in table.items() if name not in own}


@cache
def foreign_options() -> dict[str, Rule]:
    """Name to rule of every option that other trainers have and `run` and its stages have not."""
    return without_settings(EVERY, names(Run))


def foreign(name: str, value: Any) -> Outcome | None:
    """What becomes of a foreign option by its bare name; None if it is unknown."""
    rule = foreign_options().get(name)
    return None if rule is None else _in_our_values(rule(plain(value)))


def _in_our_values(outcome: Outcome) -> Outcome:
    """A renamed setting may have a value of others too: `torch_dtype: bfloat16`."""
    values = dict(outcome.values)
    for setting, value in outcome.values.items():
        inner = foreign_value(setting, value)
        if inner is not None and inner.fault:
            return inner
        values |= inner.values if inner is not None else {}
    return replace(outcome, values=values)


# Values of other trainers ------------------------------------------------------------------------------------


def _dtype(value: Any) -> Outcome | None:
    text = str(value).lower()
    if text in ("float16", "fp16", "half", "torch.float16"):
        return Outcome(fault="fp16 is not supported; use bf16")
    return Outcome({"dtype": _DTYPES[text]}) if text in _DTYPES else None


def _loss(value: Any) -> Outcome | None:
    return LOSSES["sigmoid"] if str(value).lower() == "sigmoid" else None


def _max_steps(value: Any) -> Outcome | None:
    # transformers' default, for as many steps as the epochs have.
    return Outcome({"max_steps": None}) if number_of(value) == -1 else None


def _joined(setting: str) -> Any:
    def rule(value: Any) -> Outcome | None:
        if isinstance(value, (list, tuple)):
            return Outcome({setting: ",".join(map(str, value))})
        if str(value).lower() in ("all", "all_linear"):
            return Outcome({setting: "all-linear"})
        return None

    return rule


def _chat_template(value: Any) -> Outcome | None:
    if value == "tokenizer_default":
        return Outcome({"chat_template": None}, notice="the tokenizer's chat template is used")
    return None


def _eval_size(value: Any) -> Outcome | None:
    return Outcome({"eval_size": None}) if is_off(plain(value)) and value is not None else None


def _steps(value: Any) -> Outcome | None:
    number = number_of(value)
    if number is not None and 0 < number < 1:
        return Outcome(fault="must be a number of steps, not a share of them")
    return None


def _keep_checkpoints(value: Any) -> Outcome | None:
    # transformers' default, which keeps all.
    return Outcome(notice="two are kept; give a number to keep more") if value is None else None


def _push_to_hub(value: Any) -> Outcome | None:
    if plain(value) is True:
        return Outcome(fault="takes the name of the repository: --push-to-hub OWNER/NAME")
    # An empty name is a mistake.
    return Outcome({"push_to_hub": None}) if value != "" and is_off(plain(value)) else None


def _report_to(value: Any) -> Outcome | None:
    # transformers' default of before.
    return Outcome({"report_to": "none"}) if is_off(plain(value)) or value == "all" else None


_OWN: dict[str, Any] = {
    "push_to_hub": _push_to_hub,
    "report_to": _report_to,
    "eval_every": _steps,
    "save_every": _steps,
    "keep_checkpoints": _keep_checkpoints,
    "dtype": _dtype,
    "loss": _loss,
    "max_steps": _max_steps,
    "lora_target": _joined("lora_target"),
    "lora_modules_to_save": _joined("lora_modules_to_save"),
    "chat_template": _chat_template,
    "eval_size": _eval_size,
}


def foreign_value(setting: str, value: Any) -> Outcome | None:
    """What a value that other trainers give a setting, by its bare name, stands for; None for other values."""
    return _OWN[setting](value) if setting in _OWN else None
