"""Help screens: whole options and choice lists at every width, one style, panels in order."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from tisdpo_cli.cli.app import app
from tisdpo_cli.cli.options import metavar, spellings
from tisdpo_cli.settings.base import leaf_paths
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.fields import PANELS, meta

WIDTHS = (80, 100, 120)
COMMON = ("--config", "--set", "--print-config", "--schema", "--json", "--debug", "--help")


def help_of(command: str, width: int) -> str:
    """What `--help` prints."""
    done = CliRunner().invoke(app, [*([command] if command else []), "--help"], env={"COLUMNS": str(width)})
    assert done.exit_code == 0
    return done.stdout


def words_of(shown: str) -> set[str]:
    return set(shown.replace(",", " ").split())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_and_every_choice_list_is_whole(command: str, width: int) -> None:
    words = words_of(help_of(command, width))
    for path, info in leaf_paths(COMMANDS[command].settings).items():
        assert set(spellings(path, info)) <= words, path
        assert metavar(info) in words | {""}, path
    expected = COMMON if command != "env" else COMMON[4:]
    assert set(expected) <= words


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_no_line_is_too_long_and_no_word_is_broken(command: str, width: int) -> None:
    shown = help_of(command, width)
    examples = [line for line in shown.splitlines() if line.startswith("Example: ")]
    assert all(len(line) <= width for line in shown.splitlines() if line not in examples)
    assert "…" not in shown.replace("param=value,…", "")
    # The same words at any width: nothing is cut and nothing broken.
    assert shown.split() == help_of(command, 300).split()


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_flags_take_no_value_and_help_has_one_style(command: str) -> None:
    shown = help_of(command, 120)
    assert "<bool>" not in shown
    assert not re.search(r"\((?!required|default|disables)[^()]*\bdefault [^:]", shown)
    if command:
        for path, info in leaf_paths(COMMANDS[command].settings).items():
            text = info.description or ""
            assert not text.endswith("."), path
            assert text[0].islower() or not text[:2].isalpha() or text[:2].isupper() or text.startswith("KL "), path


@pytest.mark.parametrize("command", COMMANDS)
def test_panels_come_in_the_order_in_which_a_user_thinks(command: str) -> None:
    used = {meta(info)["panel"] for info in leaf_paths(COMMANDS[command].settings).values()}
    panels = re.findall(r"^([A-Z][\w ]+):$", help_of(command, 100), re.M)
    assert panels == [panel for panel in PANELS if panel in used] + ["Configuration"]


def test_help_is_plain_without_a_terminal_and_coloured_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in help_of("train", 80)
