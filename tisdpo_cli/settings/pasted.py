"""A command line or config of another trainer, taken apart: launcher, program, options. Knows no settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tisdpo_cli.errors import UsageError
from tisdpo_cli.settings.foreign.rules import number_of
from tisdpo_cli.settings.translate import Dialect
from tisdpo_cli.settings.yaml_files import read_yaml

_VARIABLE = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_LAUNCHER_FLAGS = {
    "multi_gpu", "cpu", "use_fsdp", "use_deepspeed", "same_network", "debug", "standalone", "no_python", "use_xpu",
    "quiet",
}  # fmt: skip
_PROCESSES = ("num_processes", "nproc_per_node")
_MACHINES = ("num_machines", "nnodes")
# Keys that one trainer alone has.
_AXOLOTL_KEYS = {"base_model", "rl", "sequence_len", "num_epochs", "lora_target_linear", "val_set_size"}
_LLAMA_FACTORY_KEYS = {"stage", "finetuning_type", "pref_beta", "pref_loss", "cutoff_len", "template", "lora_rank"}
_KINDS = ("dpo", "sft")


@dataclass
class Pasted:
    """What was pasted.

    Attributes:
        dialect: whose options these are.
        kind: `dpo` or `sft`.
        variables: `NAME=VALUE` in front of the command.
        options: by name with underscores; True where there is no value.
        launch: what the launcher was told, by names of TRL's options.
        notices: what is left out.
        faults: what cannot be translated.
    """

    dialect: Dialect = "trl"
    kind: str = "dpo"
    variables: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_file(path: Path, dialect: Dialect | None = None) -> Pasted:
    """A config file, of any trainer if `dialect` does not say of which.

    Raises:
        UsageError: it cannot be read.
    """
    options = {str(name).replace("-", "_"): value for name, value in read_yaml(path).items()}
    return _of_options(Pasted(dialect=dialect or _dialect_of(options), options=options))


def read_words(words: Sequence[str], dialect: Dialect | None = None) -> Pasted:
    """A command line; its config file is read, and its options win over the file's.

    A file alone is one of any trainer if `dialect` does not say of which.

    Raises:
        UsageError: there is no command of a known trainer in it.
    """
    # One word is a command line in quotes.
    rest = list(words) if len(words) > 1 else _split(words[0])
    pasted = Pasted()
    while rest and _VARIABLE.fullmatch(rest[0]):
        pasted.variables.append(rest.pop(0))
    _launcher(rest, pasted)
    _program(rest, pasted, dialect)
    return _of_options(pasted)


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line.replace("\\\n", " "))
    except ValueError as fault:
        raise UsageError(f"the command line cannot be read: {fault}", where="translate") from fault


def _dialect_of(options: Mapping[str, Any]) -> Dialect:
    if _AXOLOTL_KEYS & set(options):
        return "axolotl"
    return "llama-factory" if _LLAMA_FACTORY_KEYS & set(options) else "trl"


def _of_options(pasted: Pasted) -> Pasted:
    """What is trained is an option of some trainers, and variables are one of TRL's; nothing is not an option."""
    variables = pasted.options.pop("env", None)
    if isinstance(variables, Mapping):
        pasted.variables += [f"{name}={value}" for name, value in variables.items()]
    pasted.options = {name: value for name, value in pasted.options.items() if value is not None}
    if pasted.dialect == "llama-factory":
        pasted.kind = str(pasted.options.pop("stage", "sft"))
    elif pasted.dialect == "axolotl":
        pasted.kind = "dpo" if pasted.options.get("rl") else "sft"
    if pasted.kind not in _KINDS:
        pasted.faults.append(f"stage {pasted.kind}: only {' and '.join(_KINDS)} have a command here")
        pasted.kind = "dpo"
    return pasted


# Launchers ---------------------------------------------------------------------------------------------------


def _launcher(rest: list[str], pasted: Pasted) -> None:
    """Take the launcher in front, with its options."""
    program = Path(rest[0]).name if rest else ""
    if program == "deepspeed":
        pasted.faults.append("deepspeed: use --num-processes and --shard full, which is FSDP2")
    if program == "accelerate" and rest[1:2] == ["launch"]:
        del rest[:2]
    elif program in ("torchrun", "deepspeed"):
        del rest[:1]
    elif program.startswith("python"):
        del rest[: 2 if rest[1:2] == ["-m"] else 1]
        if rest[:1] != ["torch.distributed.run"]:
            return
        del rest[:1]
    else:
        return
    options: dict[str, str] = {}
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name in ("m", "module"):
            break
        options[name] = value if equals else "true" if name in _LAUNCHER_FLAGS or not rest else rest.pop(0)
    _launched(options, pasted)


def _launched(options: dict[str, str], pasted: Pasted) -> None:
    """What the options of a launcher ask for, and its config file."""
    asked: dict[str, Any] = {}
    if "config_file" in options:
        try:
            asked = read_yaml(Path(options["config_file"]).expanduser())
        except UsageError as fault:
            pasted.faults.append(str(fault))
    asked |= options
    _processes(asked, pasted)
    _sharding(asked, pasted)
    precision = str(asked.get("mixed_precision", "no")).lower()
    if precision in ("bf16", "fp16", "fp8"):
        pasted.launch[precision] = True
    if str(asked.get("gpu_ids", "all")) != "all":
        pasted.variables.append(f"CUDA_VISIBLE_DEVICES={asked['gpu_ids']}")
    if asked.get("cpu", asked.get("use_cpu")) in ("true", True):
        pasted.variables.append("ACCELERATE_USE_CPU=1")


def _processes(asked: Mapping[str, Any], pasted: Pasted) -> None:
    given = next((asked[name] for name in _PROCESSES if name in asked), 1)
    processes = number_of(given)
    if not isinstance(processes, int):
        pasted.faults.append("the number of processes must be a number; see --num-processes")
    elif processes != 1:
        pasted.launch["num_processes"] = processes
    if any(number_of(asked.get(name, 1)) not in (None, 1) for name in _MACHINES):
        pasted.faults.append("several machines: use accelerate launch … -m tisdpo_cli")


def _sharding(asked: Mapping[str, Any], pasted: Pasted) -> None:
    kind = str(asked.get("distributed_type", "")).upper()
    if "use_deepspeed" in asked or kind == "DEEPSPEED":
        pasted.faults.append("DeepSpeed: use --shard full, which is FSDP2")
    if "use_fsdp" in asked or kind == "FSDP":
        pasted.launch["shard"] = "full"
        config = asked.get("fsdp_config")
        if isinstance(config, dict) and config.get("fsdp_offload_params") is True:
            pasted.launch["cpu_offload"] = True


# Programs ----------------------------------------------------------------------------------------------------


def _program(rest: list[str], pasted: Pasted, dialect: Dialect | None) -> None:
    """Take the program and its options."""
    program = rest.pop(0) if rest else ""
    name = Path(program).name
    if name.endswith((".yaml", ".yml")):
        _with_file(Path(program), rest, pasted)
        pasted.dialect = dialect or _dialect_of(pasted.options)
    elif name == "trl" and rest:
        pasted.kind = rest.pop(0)
        _with_file(None, rest, pasted)
    elif name in ("dpo.py", "sft.py", "trl.scripts.dpo", "trl.scripts.sft"):
        pasted.kind = name.removesuffix(".py").rpartition(".")[2]
        _with_file(None, rest, pasted)
    elif name in ("llamafactory-cli", "lmf", "train.py", "axolotl", "axolotl.cli.train"):
        pasted.dialect = "axolotl" if name.startswith("axolotl") else "llama-factory"
        if rest[:1] == ["train"]:
            rest.pop(0)
        file = Path(rest.pop(0)) if rest and rest[0].endswith((".yaml", ".yml", ".json")) else None
        _with_file(file, rest, pasted)
    else:
        raise UsageError(
            "no command of a known trainer",
            where="translate",
            fix="give trl dpo …, llamafactory-cli train FILE, axolotl train FILE, or --from-trl FILE",
        )


def _with_file(file: Path | None, rest: list[str], pasted: Pasted) -> None:
    options = _options(rest, pasted)
    if pasted.dialect == "trl":
        named = options.pop("config", None)
        file = file if named is None else Path(str(named))
    if file is not None:
        options = {str(name).replace("-", "_"): value for name, value in read_yaml(file.expanduser()).items()} | options
    pasted.options = options


def _options(rest: list[str], pasted: Pasted) -> dict[str, Any]:
    options: dict[str, Any] = {}
    while rest:
        word = rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("--") and not equals:
            pasted.faults.append(f"unexpected argument {word!r}")
            continue
        values = [value] if equals else []
        while not equals and rest and (not rest[0].startswith("-") or number_of(rest[0]) is not None):
            values.append(rest.pop(0))
        options[name.replace("-", "_")] = True if not values else values[0] if len(values) == 1 else values
    return options
