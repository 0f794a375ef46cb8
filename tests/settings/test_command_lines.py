"""Settings as a command line: the same result again, and nothing about this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tisdpo_cli.cli.app import app
from tisdpo_cli.settings.command_lines import command_line, shown_path
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

PAIRS: dict[str, Any] = {"model": "out/sft", "dataset": "data", "output_dir": "o"}
GIVEN: list[tuple[str, dict[str, Any]]] = [
    ("train-dpo", PAIRS),
    ("train-dpo", {**PAIRS, "beta": "0.2", "lr": "1e-5", "ref_model": "owner/base", "gradient_checkpointing": True}),
    ("train-dpo", {**PAIRS, "dataset": ["a=0.7", "b c.jsonl=0.3"], "limit": "5"}),
    ("train-reverse", {**PAIRS, "loss": "tdpo2", "alpha": "0.25", "lora_r": "4", "lora_target": "q_proj, v_proj"}),
    ("train", {**PAIRS, "transform": "rank_based", "min_scale": "0.5", "center": "dataset", "eos_weight": "one"}),
    ("train-sft", {"init": True, "dataset": "data", "output_dir": "o", "layers": "2", "train_on_prompt": True}),
    ("merge", {"model": "out/dpo", "output_dir": "o", "dtype": "bf16"}),
]


@pytest.mark.parametrize(("command", "given"), GIVEN, ids=[f"{i} {name}" for i, (name, _) in enumerate(GIVEN)])
def test_the_command_line_has_the_same_settings(command: str, given: dict[str, Any]) -> None:
    settings = load(COMMANDS[command].settings, given, environ={}).settings
    words = shlex.split(command_line(settings, "o"))
    assert words[:2] == ["tisdpo", command]
    done = CliRunner().invoke(app, [*words[1:], "--print-config"])
    assert done.exit_code == 0, done.stderr
    again = COMMANDS[command].settings(value_layers=[yaml.safe_load(done.stdout)])  # type: ignore[call-arg]
    assert again == settings


def test_what_changes_no_result_is_left_out() -> None:
    given = {**PAIRS, "save_every": "3", "resume": "never", "cache_dir": "/tmp/x", "num_processes": "2", "profile": "p"}
    plain = command_line(load(COMMANDS["train-dpo"].settings, PAIRS, environ={}).settings, "o")
    assert command_line(load(COMMANDS["train-dpo"].settings, given, environ={}).settings, "o") == plain


def test_of_absolute_paths_only_the_last_part_is_shown(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    given = {**PAIRS, "model": str(tmp_path / "sft"), "dataset": str(tmp_path / "d"), "chat_template": str(template)}
    line = command_line(load(COMMANDS["train-dpo"].settings, given, environ={}).settings, "o")
    assert str(tmp_path) not in line
    assert "--model sft --dataset d --chat-template chat.jinja" in line
    assert [shown_path(name) for name in ("~/me/x", "./x", "/", "owner/x")] == ["x", "./x", "/", "owner/x"]


def test_a_mixture_that_a_command_line_cannot_say_is_named_as_such() -> None:
    given = {**PAIRS, "dataset": [{"path": "a", "prompt_column": "q"}, {"path": "b"}]}
    assert "--dataset DATASET" in command_line(load(COMMANDS["train-dpo"].settings, given, environ={}).settings, "o")
