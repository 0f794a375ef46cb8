"""Completion as shells ask for it: commands, options, choices, finished outputs; nothing heavy is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tisdpo_cli.cli import completion
from tisdpo_cli.cli.app import app
from tisdpo_cli.cli.completion import completion_app, finished_outputs, table
from tisdpo_cli.cli.options import choices_of, spellings
from tisdpo_cli.settings.base import leaf_paths
from tisdpo_cli.settings.commands import COMMANDS


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tisdpo" / completion.TABLE_FILE


def environment(shell: str, line: str) -> dict[str, str]:
    """What a shell sets for the word that a line ends with."""
    words = line.split(" ")
    bash = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    others = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    return {"_TISDPO_COMPLETE": f"complete_{shell}", **(bash if shell == "bash" else others)}


def completed(line: str, shell: str = "bash") -> list[str]:
    """The completions of the last word."""
    done = CliRunner().invoke(completion_app(table()), [], env=environment(shell, line), prog_name="tisdpo")
    return done.stdout.replace('"', " ").replace("_arguments '*: :((", "").replace("))'", "").split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("tisdpo train --transform ra", ["rank_based", "random"]),
        ("tisdpo train --preset ag", ["aggressive"]),
        ("tisdpo train-dpo --loss t", ["tdpo1", "tdpo2"]),
        ("tisdpo estimate --dtype ", ["auto", "float32", "bf16"]),
        ("tisdpo train-dpo --optimizer adamw", ["adamw", "adamw8bit"]),
        ("tisdpo train --layout sh", ["shared-prefix"]),
        ("tisdpo train --lora-d", ["--lora-dropout"]),
        ("tisdpo train-", ["train-dpo", "train-reverse", "train-sft"]),
    ],
)
def test_values_options_and_commands_complete(shell: str, line: str, values: list[str]) -> None:
    assert completed(line, shell) == values


def test_every_choice_of_every_option_completes() -> None:
    for name in ("train", "estimate", "evaluate", "run"):
        for path, info in leaf_paths(COMMANDS[name].settings).items():
            if choices := choices_of(info.annotation):
                assert completed(f"tisdpo {name} {spellings(path, info)[0]} ") == list(choices)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_answered_without_anything_heavy(shell: str, cache: Path) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'yaml', 'rich', 'tisdpo_cli.settings'}\n"
        "atexit.register(lambda: print('HEAVY', *(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from tisdpo_cli.cli.start import main\nmain()"
    )
    table()
    assert cache.is_file()
    env = {**os.environ, **environment(shell, "tisdpo train --transform ra")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stderr.split() == ["HEAVY"]
    assert "rank_based" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = CliRunner().invoke(app, ["--show-completion", shell], prog_name="tisdpo")
    assert done.exit_code == 0
    assert f"_TISDPO_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_itself_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="tisdpo").stdout
    (tmp_path / "tisdpo").write_text(f'#!/bin/sh\nexec {sys.executable} -m tisdpo_cli "$@"\n')
    (tmp_path / "tisdpo").chmod(0o755)
    asked = 'COMP_WORDS=(tisdpo train --transform ra); COMP_CWORD=3; _tisdpo_completion tisdpo; echo "${COMPREPLY[@]}"'
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["rank_based", "random"]


# ---------------------------------------------------------------- the table


def test_the_table_is_kept_until_the_program_changes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = table()
    assert list(first) == list(COMMANDS)
    monkeypatch.setattr(completion, "_from_settings", lambda: {"changed": {"options": [], "positional": None}})
    assert table() == json.loads(json.dumps(first))
    monkeypatch.setattr(completion, "__version__", "another")
    assert list(table()) == ["changed"]
    assert json.loads(cache.read_text())["key"].startswith("another")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}'])
def test_a_broken_table_is_made_again(cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    assert list(table()) == list(COMMANDS)
    assert json.loads(cache.read_text())["commands"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert list(table()) == list(COMMANDS)


# ---------------------------------------------------------------- paths


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Finished outputs, an unfinished one, a foreign marker and a deep one."""
    commands = {"out/dpo": "train-dpo", "out/scored": "estimate", "out/deep/a": "train", "other": "train-sft"}
    for name, command in commands.items():
        (tmp_path / "w" / name).mkdir(parents=True)
        (tmp_path / "w" / name / "run.json").write_text(json.dumps({"command": command}))
    for name, text in {"out/broken": "{", "out/list": "[]", ".hidden": '{"command": "train"}'}.items():
        (tmp_path / "w" / name).mkdir()
        (tmp_path / "w" / name / "run.json").write_text(text)
    (tmp_path / "w/out/unfinished/checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


@pytest.mark.parametrize(
    ("typed", "reads", "found"),
    [
        ("", "model", ["other", "out/dpo", "out/deep/a"]),
        ("out/d", "model", ["out/dpo", "out/deep/a"]),
        ("out/", "dataset", ["out/scored"]),
        ("./ou", "dataset", ["./out/scored"]),
        ("x", "model", []),
        ("nowhere/x", "model", []),
    ],
)
def test_finished_outputs_complete(outputs: Path, typed: str, reads: str, found: list[str]) -> None:
    assert list(finished_outputs(typed, reads)) == found


def test_a_home_directory_stays_as_it_is_typed(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(outputs))
    assert list(finished_outputs("~/out/sc", "dataset")) == ["~/out/scored"]


def test_options_that_read_complete_outputs_of_their_kind(outputs: Path) -> None:
    assert completed("tisdpo estimate --forward out/d") == ["out/dpo", "out/deep/a"]
    assert completed("tisdpo train --dataset out/") == ["out/scored"]
    assert completed("tisdpo inspect-weights out/") == ["out/scored"]
    assert completed("tisdpo merge oth") == ["other"]
    # The shell completes other files.
    assert completed("tisdpo train --output-dir out/") == []
