"""Sources of values: flags, `--set`, the environment, a file. Each source becomes a layer of dotted names.

Every setting has one name, that of its flag with underscores. `beta`, `method.beta` and `method: {beta: …}` are the
same setting in every source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tisdpo_cli.errors import UsageError
from tisdpo_cli.settings.base import Command, leaf_paths
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.fields import group_of, meta
from tisdpo_cli.settings.names import case, did_you_mean, locate, names
from tisdpo_cli.settings.run import STAGES, Run, Stages
from tisdpo_cli.settings.wiring import Layer, planned, stage_layer, wiring
from tisdpo_cli.settings.yaml_files import read_yaml

ENV_PREFIX = "TISDPO_"


@dataclass(frozen=True)
class Loaded:
    """Settings, the source of every value that is not a default, and notices for the user."""

    settings: Command
    origins: dict[str, str]
    notices: tuple[str, ...] = ()


def load(
    command: type[Command],
    flags: Mapping[str, Any],
    *,
    config: Path | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Resolve the settings of a command: flags over `--set` over environment over file over defaults.

    Raises:
        UsageError: an unknown key, a value out of range, an unreadable file; all problems are reported at once.
    """
    faults: list[str] = []
    layers = [
        Layer("flag", _flatten(command, flags, "", faults)),
        Layer("--set", _from_sets(command, sets, faults)),
        Layer("environment", _from_environment(command, environ or {}, faults)),
    ]
    if config is not None:
        layers.append(Layer(str(config), _flatten(command, read_yaml(config), f"{config}: ", faults)))
    try:
        loaded = _load_run(layers) if issubclass(command, Run) else _build(command, layers)
    except UsageError as fault:
        faults += fault.details or (fault.what,)
    _stop_at(faults)
    return loaded


def _build(command: type[Command], layers: Sequence[Layer]) -> Loaded:
    try:
        settings = command(value_layers=[_nest(layer.values) for layer in layers])  # type: ignore[call-arg]
    except ValidationError as fault:
        _stop_at(_sentences(command, fault))
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
    head = _build(
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
            loaded = _build(STAGES[stage], stage_layers)
        except UsageError as fault:
            faults += [f"{stage}: {line}" for line in (fault.details or (fault.what,))]
            continue
        stages[stage] = loaded.settings
        origins.update({f"{stage}.{name}": origin for name, origin in loaded.origins.items()})
    _stop_at(faults)
    try:
        settings = Run(value_layers=[*(_nest(t.values) for t in tops)], **stages)  # type: ignore[arg-type, call-arg]
    except ValidationError as fault:
        _stop_at(_sentences(Run, fault))
    unused = [stage for stage in STAGES if stage in sections and stage not in stages_planned]
    notice = f"ignoring the settings of {' and '.join(unused)}: method {head.settings.method} has no such stage"
    return Loaded(settings, origins, (notice,) if unused else ())


# One source at a time ---------------------------------------------------------------------------------------


def _flatten(command: type[Command], values: Mapping[str, Any], where: str, faults: list[str]) -> dict[str, Any]:
    """Nested values by dotted name; unknown and repeated names are added to the faults."""
    flat: dict[str, Any] = {}
    seen: set[str] = set()
    for name, value in _walk(command, values, ""):
        path = locate(command, name)
        if name in STAGES:
            faults.append(f"{where}{name} is a section, not a value")
        elif path is None:
            faults.append(f"{where}unknown setting {name!r}{did_you_mean(name, names(command))}")
        elif (key := _once(command, path)) in seen:
            faults.append(f"{where}{path} is given twice, once as {name!r}")
        else:
            seen.add(key)
            flat[path] = value
    return flat


def _once(command: type[Command], path: str) -> str:
    """The name under which a setting may be given once: the bare name for shared settings of `run`."""
    shared = issubclass(command, Run) and path.partition(".")[0] not in STAGES
    return path.rpartition(".")[2] if shared else path


def _walk(command: type[Command], values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('-', '_')}"
        if isinstance(value, Mapping) and value and name.rpartition(".")[2] not in _json_settings(command):
            yield from _walk(command, value, f"{name}.")
        elif value not in (None, {}) or not _is_section(command, name):
            yield name, value
        elif name in STAGES:
            # An empty section still enables the stage.
            yield f"{name}.", None


def _json_settings(command: type[Command]) -> set[str]:
    """Bare names of settings whose value may be a mapping."""
    commands = [command, *STAGES.values()] if issubclass(command, Run) else [command]
    paths = ((path, info) for c in commands for path, info in leaf_paths(c).items())
    return {path.rpartition(".")[2] for path, info in paths if meta(info).get("metavar") == "JSON"}


def _is_section(command: type[Command], name: str) -> bool:
    commands = [command, *(STAGES[stage] for stage in STAGES)] if issubclass(command, Run) else [command]
    groups = {key for c in commands for key, info in c.model_fields.items() if group_of(info) is not None}
    return name in STAGES or name.rpartition(".")[2] in groups


def _from_sets(command: type[Command], sets: Sequence[str], faults: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in sets:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            faults.append(f"--set {item!r}: write --set name=value")
            continue
        values[name.strip()] = _scalar(text)
    return _flatten(command, values, "--set ", faults)


def _from_environment(command: type[Command], environ: Mapping[str, str], faults: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable[len(ENV_PREFIX) :].lower().replace("__", ".")
        known = [case(spec.settings, name) for spec in COMMANDS.values()]
        if not any(known):
            variables = {
                f"{ENV_PREFIX}{n.upper().replace('.', '__')}"
                for spec in COMMANDS.values()
                for n in names(spec.settings)
            }
            faults.append(f"unknown environment variable {variable}{did_you_mean(variable, variables)}")
        mine = case(command, name)
        if mine is not None:
            values[mine] = _scalar(text)
    return _flatten(command, values, "environment: ", faults)


def _scalar(text: str) -> Any:
    return None if text.strip().lower() in ("null", "~") else text


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


def _stop_at(faults: Sequence[str]) -> None:
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
            lines.append(f"{indent}{name}: {_yaml_scalar(value)}{comment}")


def _wiring_names(stage: str) -> Iterable[str]:
    if stage not in STAGES:
        return ()
    head = Stages(dataset="-", output_dir="-")
    return wiring(head, with_sft=True)[stage]


def _yaml_scalar(value: Any) -> str:
    if isinstance(value, tuple):
        value = [part.plain() for part in value]
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10**6, allow_unicode=style is None)
    return text.removesuffix("\n").removesuffix("\n...")
