"""`translate`: a command or config of another trainer as settings, which are written as a command line or a config."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tisdpo_cli.errors import UsageError
from tisdpo_cli.settings.base import Command, leaf_paths
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.datasets import parts_of, words_of
from tisdpo_cli.settings.foreign.rules import is_off, plain
from tisdpo_cli.settings.layers import Findings, Source, flatten, option
from tisdpo_cli.settings.names import did_you_mean, names
from tisdpo_cli.settings.pasted import Pasted, read_file, read_words
from tisdpo_cli.settings.sources import build, stop_at, yaml_scalar
from tisdpo_cli.settings.translate import Dialect, Translate
from tisdpo_cli.settings.wiring import Layer

_COMMANDS = {"dpo": "train-dpo", "sft": "train-sft"}
_TRAINER = {"optimizer": "adamw", "max_grad_norm": 1.0, "epochs": 3.0, "gradient_accumulation": 1, "seed": 42}
# What each trainer does where nothing else is asked for.
_DEFAULTS: dict[Dialect, dict[str, Any]] = {
    "trl": {
        **_TRAINER, "learning_rate": 1e-6, "lr_scheduler": "linear", "warmup_steps": 0, "micro_batch_size": 8,
        "max_length": 1024, "gradient_checkpointing": True,
    },
    "llama-factory": {
        **_TRAINER, "learning_rate": 5e-5, "lr_scheduler": "linear", "warmup_steps": 0, "micro_batch_size": 8,
        "max_length": 2048, "gradient_checkpointing": True,
    },
    "axolotl": {
        **_TRAINER, "epochs": 1.0, "lr_scheduler": "cosine", "warmup_steps": 0.03, "micro_batch_size": 1,
        "max_length": 512,
    },
}  # fmt: skip
_SFT_DEFAULTS: dict[Dialect, dict[str, Any]] = {"trl": {"learning_rate": 2e-5}, "llama-factory": {}, "axolotl": {}}
_NAMES: dict[Dialect, str] = {"trl": "TRL", "llama-factory": "LLaMA-Factory", "axolotl": "axolotl"}
_OF_ADAPTERS = ("lora_", "peft_", "use_rslora", "use_dora", "additional_target")


@dataclass(frozen=True)
class Translation:
    """The same training here.

    Attributes:
        command: of this program.
        variables: `NAME=VALUE` to put in front of the command.
        settings: what differs from the defaults, by dotted name, validated.
        notices: what was translated, left out or added.
    """

    command: str
    variables: tuple[str, ...]
    settings: dict[str, Any]
    notices: tuple[str, ...]

    def command_line(self) -> str:
        """The command line, ready to paste.

        Raises:
            UsageError: only a config can say it.
        """
        words = [*self.variables, "tisdpo", self.command]
        for path, value in self.settings.items():
            words += _words(path, value)
        return shlex.join(words)

    def yaml(self) -> str:
        """The lines of a config file for the command."""
        head = [f"# tisdpo {self.command} --config FILE"]
        return "\n".join(
            [*head, *(f"{path.rpartition('.')[2]}: {yaml_scalar(v)}" for path, v in self.settings.items())]
        )


def translate(settings: Translate) -> Translation:
    """Translate a command line or a config file.

    Raises:
        UsageError: something in it has no equivalent; everything that has none is listed.
    """
    dialect = None if settings.dialect == "auto" else settings.dialect
    if settings.from_trl is not None:
        pasted = read_file(Path(settings.from_trl).expanduser(), dialect)
    else:
        pasted = read_words(settings.words or [], dialect)
    spec = COMMANDS[_COMMANDS[pasted.kind]]
    found = Findings([*pasted.faults], [*pasted.notices])
    options = _prepared(pasted, found)
    values = flatten(spec.settings, options.items(), _source(settings), found)
    values = _with_defaults(spec.settings, pasted, values, found)
    try:
        built = build(spec.settings, [Layer("translation", values)])
    except UsageError as fault:
        found.faults += fault.details or (fault.what,)
    stop_at(found.faults)
    settled = _settled(built.settings, values)
    return Translation(spec.settings.command, tuple(pasted.variables), settled, found.lines())


def _source(settings: Translate) -> Source:
    spell: Callable[[str], str] = (lambda name: f"{settings.from_trl}: {name}") if settings.from_trl else option
    return Source("", spell, lambda command, name: f"unknown {spell(name)}{did_you_mean(name, names(command))}")


# What one name alone does not say --------------------------------------------------------------------------------


def _prepared(pasted: Pasted, found: Findings) -> dict[str, Any]:
    """The options as they are meant together."""
    options = {**pasted.launch, **pasted.options}
    dataset = options.get("dataset_name")
    if dataset is not None and not is_off(options.get("dataset_config")):
        options["dataset_name"] = f"{dataset}:{options['dataset_config']}"
        del options["dataset_config"]
    precision = plain(options.get("bf16"))
    for name in ("dtype", "torch_dtype"):
        # The type of the weights; the computation is in bf16 unless that is switched off.
        if pasted.dialect == "trl" and name in options and precision is not False:
            found.notices.append(f"{option(name)}: weights are trained in float32; --dtype says what computes")
            del options[name]
    options = _of_adapter(options, pasted, found)
    if pasted.dialect == "llama-factory":
        options.setdefault("finetuning_type", "lora")
        if isinstance(options.get("dataset"), str) and "," in options["dataset"]:
            options["dataset"] = [name.strip() for name in options["dataset"].split(",")]
        if "dataset" in options:
            found.notices.append("--dataset: put a path or hub id in the place of the name in dataset_info.json")
    template = options.get("chat_template")
    if pasted.dialect == "axolotl" and template is not None and not Path(str(template)).is_file():
        found.notices.append("chat_template: the tokenizer's is used; see --chat-template")
        del options["chat_template"]
    return options


def _of_adapter(options: dict[str, Any], pasted: Pasted, found: Findings) -> dict[str, Any]:
    """The options without those of an adapter where there is none."""
    if _has_adapter(pasted):
        if pasted.dialect == "trl" and "lora_target_modules" not in options:
            found.notices.append("all linear layers are adapted; peft adapts some for TRL, see --lora-target")
        return options
    without = [name for name in options if name.startswith(_OF_ADAPTERS)]
    if without:
        found.notices.append(f"without an adapter these have no effect: {', '.join(map(option, without))}")
    return {name: value for name, value in options.items() if name not in without}


def _has_adapter(pasted: Pasted) -> bool:
    options = pasted.options
    if pasted.dialect == "trl":
        return plain(options.get("use_peft")) is True
    if pasted.dialect == "axolotl":
        return not is_off(options.get("adapter"))
    return options.get("finetuning_type", "lora") == "lora"


def _with_defaults(
    command: type[Command], pasted: Pasted, values: Mapping[str, Any], found: Findings
) -> dict[str, Any]:
    """The values with what the other trainer does by default and this program does otherwise, by dotted name."""
    paths = leaf_paths(command)
    by_name = {path.rpartition(".")[2]: path for path in paths}
    wanted = _DEFAULTS[pasted.dialect] | (_SFT_DEFAULTS[pasted.dialect] if pasted.kind == "sft" else {})
    added = {by_name[name]: value for name, value in wanted.items()}
    added = {path: value for path, value in added.items() if path not in values and paths[path].default != value}
    if added:
        listed = ", ".join(f"{path.rpartition('.')[2]} {yaml_scalar(value)}" for path, value in added.items())
        found.notices.append(f"defaults of {_NAMES[pasted.dialect]} that differ here: {listed}")
    longest, prompt = plain({**added, **values}.get("data.max_length")), by_name["max_prompt_length"]
    if isinstance(longest, int) and 1 < longest <= paths[prompt].default and prompt not in values:
        added[prompt] = longest // 2
        found.notices.append(f"--max-prompt-length {longest // 2}, which must be below --max-length")
    return {**values, **added}


# Writing -----------------------------------------------------------------------------------------------------


def _settled(settings: Command, values: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings with their validated values, the required ones first, without what is unset anyway."""
    leaves = {path: value for path, info, value in settings.leaves() if not (value is None and info.default is None)}
    required = [path for path, info in leaf_paths(type(settings)).items() if info.is_required()]
    ordered = [*(path for path in required if path in values), *(path for path in values if path not in required)]
    return {path: leaves[path] for path in ordered if path in leaves}


def _words(path: str, value: Any) -> list[str]:
    name = path.rpartition(".")[2]
    if path == "dataset":
        if any(part.own() for part in parts_of(value)):
            raise UsageError("a command line cannot say how each dataset is read", where="datasets", fix="use --yaml")
        return [word for part in words_of(value) for word in ("--dataset", part)]
    if value is True:
        return [option(name)]
    if value is False:
        return [option(name), "false"]
    if value is None:
        return ["--set", f"{name}=null"]
    return [option(name), _number(value) if isinstance(value, float) else str(value)]


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")
