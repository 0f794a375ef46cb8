"""The JSON schema of what `--config` accepts for a command: settings in their groups, or by their bare names."""

from __future__ import annotations

from typing import Any

from tisdpo_cli.settings.base import Command, leaf_paths
from tisdpo_cli.settings.fields import meta
from tisdpo_cli.settings.run import STAGES, Run

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
# What `setting` attaches to a field for the program's own use.
_INTERNAL = {"panel", "flags", "shapes_result", "repeated", "reads", "metavar", "many"}


def json_schema(command: type[Command]) -> dict[str, Any]:
    """The JSON schema of a config file of a command.

    Every setting is accepted in its group and by its bare name. For `run`, the top level also takes the settings that
    any stage has, and a section for each stage; what `run` requires may come from there, so nothing else is required.
    """
    schema = _without_internal(command.model_json_schema())
    definitions = schema.get("$defs", {})
    _accept_bare_names(schema, command, definitions)
    if issubclass(command, Run):
        for stage in STAGES.values():
            definition = definitions[stage.__name__]
            _accept_bare_names(definition, stage, definitions)
            definition.pop("required", None)
            for name, value in definition["properties"].items():
                schema["properties"].setdefault(name, value)
        schema["properties"] |= {name: {"$ref": f"#/$defs/{stage.__name__}"} for name, stage in STAGES.items()}
    # Flags, the environment and --set may give what a file leaves out.
    schema.pop("required", None)
    return {"$schema": _DRAFT, **schema, "title": f"tisdpo {command.command}"}


def _without_internal(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_internal(item) for item in value]
    if not isinstance(value, dict):
        return value
    is_setting = "panel" in value and "shapes_result" in value
    return {name: _without_internal(item) for name, item in value.items() if not (is_setting and name in _INTERNAL)}


def _accept_bare_names(schema: dict[str, Any], command: type[Command], definitions: dict[str, Any]) -> None:
    properties = schema["properties"]
    for path, info in leaf_paths(command).items():
        group, dot, name = path.partition(".")
        value = properties[group]
        if dot:
            reference = value.get("$ref") or value["allOf"][0]["$ref"]
            value = definitions[reference.rpartition("/")[2]]["properties"][name]
        spellings = [flag[2:].replace("-", "_") for flag in meta(info).get("flags", ()) if flag.startswith("--")]
        for spelling in (name or group, *spellings):
            properties.setdefault(spelling, value)
