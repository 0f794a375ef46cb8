"""Sources of values: flags, `--set`, the environment, a file. Each source becomes a layer of dotted names.

Every setting has one name, that of its flag with underscores. `beta`, `method.beta` and `method: {beta: …}` are the
same setting in every source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tisdpo_cli.errors import UsageError
from tisdpo_cli.settings.base import Command, leaf_paths
from tisdpo_cli.settings.datasets import DatasetPart
from tisdpo_cli.settings.layers import FLAGS, Findings, file_source, flatten, from_environment, from_sets, walk
from tisdpo_cli.settings.run import STAGES, Run, Stages
from tisdpo_cli.settings.wiring import Layer, planned, stage_layer, wiring
from tisdpo_cli.settings.yaml_files import read_yaml


@dataclass(frozen=True)
class Loaded:
    """Settings, the source of every value that is not a default, and notices for the user.

    Attributes:
        flags: the values of the command line, by dotted name.
    """

    settings: Command
    origins: dict[str, str]
    notices: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)


def load(
    command: type[Command],
    flags: Mapping[str, Any],
    *,
    config: Path | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    further: Sequence[tuple[str, Any]] = (),
    faults: Sequence[str] = (),
) -> Loaded:
    """Resolve the settings of a command: flags over `--set` over environment over file over defaults.

    Args:
        command: whose settings.
        flags: values of the command line, by dotted or bare name, nested or not.
        config: a YAML file.
        sets: `NAME=VALUE` each.
        environ: variables, of which `TISDPO_*` count.
        further: options of the command line that are none of this command, by bare name, with their values.
        faults: what else is wrong with the command line.

    Raises:
        UsageError: an unknown key, a value out of range, an unreadable file; all problems are reported at once.
    """
    found = Findings([*faults])
    layers = [
        Layer("flag", flatten(command, [*walk(command, flags), *further], FLAGS, found)),
        Layer("--set", from_sets(command, sets, found)),
        Layer("environment", from_environment(command, environ or {}, found)),
    ]
    if config is not None:
        try:
            values = read_yaml(config)
        except UsageError as fault:
            # What the file would have given is unknown, and so is what is missing.
            stop_at([*found.faults, str(fault)] if found.faults else [], fault)
        layers.append(Layer(str(config), flatten(command, walk(command, values), file_source(config), found)))
    try:
        loaded = _load_run(layers) if issubclass(command, Run) else build(command, layers)
    except UsageError as fault:
        found.faults += fault.details or (fault.what,)
    stop_at(found.faults)
    return Loaded(loaded.settings, loaded.origins, (*found.lines(), *loaded.notices), layers[0].values)


def build(command: type[Command], layers: Sequence[Layer]) -> Loaded:
    """The settings of one command from layers of dotted names.

    Raises:
        UsageError: with all that is invalid.
    """
    try:
        settings = command(value_layers=[_nest(layer.values) for layer in layers])
    except ValidationError as fault:
        stop_at(_sentences(command, fault))
    return Loaded(settings, _origins(layers))


def _origins(layers: Sequence[Layer]) -> dict[str, str]:
    origins: dict[str, str] = {}
    for layer in layers:
        for name in layer.values:
            origins.setdefault(name, layer.origin)
    return origins


def _load_run(layers: Sequence[Layer]) -> Loaded:
    """Build `Run` with the settings of each stage: its own section first, then the top level."""
    own = leaf_paths(Run)
    tops = [Layer(layer.origin, {k: v for k, v in layer.values.items() if k in own}) for layer in layers]
    head = build(
        Stages, [Layer(t.origin, {k: v for k, v in t.values.items() if k in leaf_paths(Stages)}) for t in tops]
    )
    assert isinstance(head.settings, Stages)
    sections = {name.partition(".")[0] for layer in layers for name in layer.values} & set(STAGES)
    with_sft = head.settings.model is None or "train_sft" in sections
    wired, stages_planned = wiring(head.settings, with_sft), planned(head.settings.method, with_sft)
    stages: dict[str, Command] = {}
    origins = _origins(tops)
    faults: list[str] = []
    for stage in stages_planned:
        stage_layers = [Layer("run", wired[stage]), *(stage_layer(stage, la, wired[stage], faults) for la in layers)]
        try:
            loaded = build(STAGES[stage], stage_layers)
        except UsageError as fault:
            faults += [f"{stage}: {line}" for line in (fault.details or (fault.what,))]
            continue
        stages[stage] = loaded.settings
        origins.update({f"{stage}.{name}": origin for name, origin in loaded.origins.items()})
    stop_at(faults)
    try:
        settings = Run(value_layers=[*(_nest(t.values) for t in tops)], **stages)  # type: ignore[arg-type, call-arg]
    except ValidationError as fault:
        stop_at(_sentences(Run, fault))
    unused = [stage for stage in STAGES if stage in sections and stage not in stages_planned]
    notice = f"ignoring the settings of {' and '.join(unused)}: method {head.settings.method} has no such stage"
    return Loaded(settings, origins, (notice,) if unused else ())


# Error messages --------------------------------------------------------------------------------------


def _sentences(command: type[Command], fault: ValidationError) -> list[str]:
    """One sentence per fault, with the setting and its flag. Values are left out: they may be secret."""
    sentences = []
    for error in fault.errors(include_url=False, include_input=False, include_context=False):
        path = ".".join(str(part) for part in error["loc"])
        message = error["msg"].removeprefix("Value error, ")
        if message[1:2].islower():
            message = message[0].lower() + message[1:]
        if error["type"] == "missing":
            sentences.append(f"--{path.replace('_', '-')} is required")
        elif path in leaf_paths(command):
            sentences.append(f"--{path.rpartition('.')[2].replace('_', '-')} ({path}): {message}")
        else:
            sentences.append(f"{path}: {message}" if path else message)
    return sentences


def stop_at(faults: Sequence[str], otherwise: UsageError | None = None) -> None:
    """Stop with one message for all faults, if there are any.

    Raises:
        UsageError: the faults; `otherwise` if there are none.
    """
    if not faults and otherwise is not None:
        raise otherwise
    if not faults:
        return
    if len(faults) == 1:
        raise UsageError(faults[0])
    raise UsageError(f"{len(faults)} invalid settings: " + "; ".join(faults), details=tuple(faults))


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        group, dot, name = path.partition(".")
        if dot and name:
            nested.setdefault(group, {})[name] = value
        elif not dot:
            nested[path] = value
    return nested


# Writing YAML --------------------------------------------------------------------------------------


def to_yaml(settings: Command, origins: Mapping[str, str] | None = None) -> str:
    """Settings as YAML that `--config` accepts, with the origin of each value as a comment if given."""
    lines: list[str] = []
    _write(lines, settings, "", 0, origins)
    return "\n".join(lines) + "\n"


def _write(lines: list[str], settings: Any, prefix: str, depth: int, origins: Mapping[str, str] | None) -> None:
    stage, _, group = prefix.partition(".")
    wired = set(_wiring_names(stage))
    for name in type(settings).model_fields:
        value, path = getattr(settings, name), f"{prefix}{name}"
        indent = "  " * depth
        if f"{group}{name}" in wired:
            continue
        if hasattr(type(value), "model_fields"):
            lines.append(f"{indent}{name}:")
            _write(lines, value, f"{path}.", depth + 1, origins)
        elif not (value is None and path in STAGES):
            comment = f"  # {origins.get(path, 'default')}" if origins is not None else ""
            lines.append(f"{indent}{name}: {yaml_scalar(value)}{comment}")


def _wiring_names(stage: str) -> Iterable[str]:
    if stage not in STAGES:
        return ()
    head = Stages(dataset="-", output_dir="-")
    return wiring(head, with_sft=True)[stage]


def yaml_scalar(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, tuple):
        value = [part.plain() if isinstance(part, DatasetPart) else part for part in value]
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10**6, allow_unicode=style is None)
    return text.removesuffix("\n").removesuffix("\n...")
