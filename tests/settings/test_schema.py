"""`--schema`: the JSON schema of a config file accepts what `--config` accepts, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tisdpo_cli.cli.app import app
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.names import names
from tisdpo_cli.settings.sources import load, to_yaml

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def schema_of(command: str) -> dict[str, Any]:
    """What `--schema` prints."""
    done = CliRunner().invoke(app, [command, "--schema"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def unknown_keys(values: Any, schema: dict[str, Any], root: dict[str, Any]) -> list[str]:
    """Keys of nested mappings that a schema does not name."""
    for choice in schema.get("anyOf", ()):
        if choice.get("type") != "null":
            return unknown_keys(values, choice, root)
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if not isinstance(values, dict):
        return []
    properties = schema.get("properties", {})
    assert schema.get("additionalProperties") is False
    return [
        found
        for key, value in values.items()
        for found in ([key] if key not in properties else unknown_keys(value, properties[key], root))
    ]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_in_the_schema(path: Path) -> None:
    schema = schema_of("run")
    assert unknown_keys(yaml.safe_load(path.read_text()), schema, schema) == []
    assert unknown_keys({"train_dpo": {"betta": 1}}, schema, schema) == ["betta"]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "env"])
def test_every_name_of_a_setting_is_in_the_schema(command: str) -> None:
    schema = schema_of(command)
    bare = {name for name in names(COMMANDS[command].settings) if "." not in name}
    if command == "run":  # set by run itself, so its sections have them
        bare -= {"forward", "reverse", "scored", "init", "dry_run", "push_to_hub"}
    assert bare <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert "required" not in schema


def test_types_defaults_bounds_and_help_are_in_the_schema() -> None:
    schema = schema_of("train")
    beta = schema["properties"]["beta"]
    assert (beta["type"], beta["default"], beta["exclusiveMinimum"]) == ("number", 0.1, 0)
    assert beta["description"].startswith("KL penalty coefficient")
    assert schema["$defs"]["Memory"]["properties"]["dtype"]["enum"] == ["auto", "float32", "bf16"]
    assert schema["properties"]["lr"] == schema["properties"]["learning_rate"]
    assert "panel" not in json.dumps(schema)


@pytest.mark.parametrize("command", ["train-dpo", "train-sft", "estimate", "train", "evaluate"])
def test_what_a_command_writes_as_its_config_is_in_the_schema(command: str) -> None:
    flags = {
        "train-dpo": {"model": "m"},
        "train-sft": {"init": True},
        "estimate": {"forward": "f", "reverse": "r"},
        "train": {"model": "m"},
        "evaluate": {"model": "m", "ref_model": "r"},
    }[command] | {"dataset": "d"}
    if command != "evaluate":
        flags["output_dir"] = "o"
    schema = schema_of(command)
    written = yaml.safe_load(to_yaml(load(COMMANDS[command].settings, flags, environ={}).settings))
    assert unknown_keys(written, schema, schema) == []
