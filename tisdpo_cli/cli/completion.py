"""Completion in shells, by Typer: commands, options, choices, and paths of finished outputs.

A shell waits for it, so the settings, which take their time to import, are read once and kept as a table in the cache.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Optional

import typer

from tisdpo_cli import __version__
from tisdpo_cli.files import RUN_FILE, cache_directory, replacing

TABLE_FILE = "completion.json"
# What the options of a table come from.
_SOURCES = ("settings", "method", "cli/options.py", "cli/completion.py", "formats.py")
# Directories looked into for outputs below what was typed, and how deep.
_MOST_DIRECTORIES, _DEPTH = 2000, 3
_SCORED = "estimate"
_NAME_ALONE: dict[str, Any] = {"options": [], "positional": None}


def run(*_arguments: Any) -> NoReturn:
    """Answer a shell, and exit."""
    words = (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()
    # The others are complete by their names.
    commands = {name: command if name in words[1:2] else _NAME_ALONE for name, command in table().items()}
    completion_app(commands)(prog_name="tisdpo")
    raise SystemExit(0)


def completion_app(commands: Mapping[str, Mapping[str, Any]]) -> typer.Typer:
    """A program with the options of a table, which does nothing.

    Args:
        commands: by name: `positional`, what it reads, or None; `options`: spellings, whether it is a flag, choices,
            and what it reads.
    """
    app = typer.Typer(name="tisdpo", context_settings={"help_option_names": ["-h", "--help"]})

    @app.callback()
    def _main(version: bool = typer.Option(False, "--version")) -> None:
        """Nothing happens."""

    for name, command in commands.items():
        app.command(name)(_command(command))
    return app


def _command(command: Mapping[str, Any]) -> Callable[..., None]:
    def function(**_given: Any) -> None:
        pass

    parameters = [_parameter(f"option_{n}", option) for n, option in enumerate(command["options"])]
    if command["positional"] is not None:
        argument = typer.Argument(None, autocompletion=_completer((), command["positional"]))
        parameters.append(_keyword("bare", Optional[str], argument))  # noqa: UP045
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def _parameter(name: str, option: Mapping[str, Any]) -> inspect.Parameter:
    completer = _completer(option["choices"], option["reads"])
    kind = Optional[bool] if option["flag"] else Optional[str]  # noqa: UP045
    return _keyword(name, kind, typer.Option(None, *option["flags"], autocompletion=completer))


def _keyword(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)


def _completer(choices: Any, reads: str | None) -> Callable[[str], list[str]] | None:
    if reads:
        return lambda incomplete: list(finished_outputs(incomplete, reads))
    # Typer does not filter what a function returns.
    return (lambda incomplete: [c for c in choices if c.startswith(incomplete)]) if choices else None


# Paths -------------------------------------------------------------------------------------------------------


def finished_outputs(typed: str, reads: str) -> Iterator[str]:
    """Paths of finished outputs that begin with what was typed; a shell completes other paths where there are none.

    Args:
        typed: the beginning of a path.
        reads: `dataset` for scored datasets, `model` for models.
    """
    folder, beginning = os.path.split(typed)
    start = Path(folder).expanduser() if folder else Path()
    waiting = [(path, 1) for path in _directories(start) if path.name.startswith(beginning)]
    for seen, (path, depth) in enumerate(waiting):
        if seen >= _MOST_DIRECTORIES:
            return
        command = _command_of(path)
        if command is None and depth < _DEPTH:
            waiting += [(inner, depth + 1) for inner in _directories(path)]
        elif command is not None and (command == _SCORED) == (reads == "dataset"):
            yield os.path.join(folder, path.relative_to(start)) if folder else str(path)  # noqa: PTH118 - keeps `~`


def _directories(folder: Path) -> list[Path]:
    with suppress(OSError):
        inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
        return [folder / name for name in inner]
    return []


def _command_of(path: Path) -> str | None:
    """The command that made an output; None if it is none, or not finished."""
    with suppress(OSError, ValueError):
        record = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        command = record.get("command") if isinstance(record, dict) else None
        return command if isinstance(command, str) else None
    return None


# The table ---------------------------------------------------------------------------------------------------


def table() -> dict[str, Any]:
    """The commands with their options, from the cache where it is of this program as it is."""
    path, key = cache_directory() / TABLE_FILE, _key()
    with suppress(OSError, ValueError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(kept, dict) and kept.get("key") == key:
            return dict(kept["commands"])
    commands = _from_settings()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, f"{os.getpid()}-") as partial:
            partial.write_text(json.dumps({"key": key, "commands": commands}), encoding="utf-8", newline="\n")
    return commands


def _key() -> str:
    """Changes with the version, and with the files that define options."""
    root = Path(__file__).parents[1]
    files = [path for name in _SOURCES for path in _python_files(root / name)]
    newest = max(path.stat().st_mtime_ns for path in files)
    return f"{__version__} {len(files)} {newest} {root}"


def _python_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _from_settings() -> dict[str, Any]:
    from tisdpo_cli.cli.options import choices_of, common_kinds, spellings
    from tisdpo_cli.settings.base import leaf_paths
    from tisdpo_cli.settings.commands import COMMANDS
    from tisdpo_cli.settings.fields import meta

    commands = {}
    for name, spec in COMMANDS.items():
        paths = leaf_paths(spec.settings)
        options = [
            {
                "flags": spellings(path, info),
                "flag": info.annotation is bool,
                "choices": choices_of(info.annotation),
                "reads": meta(info)["reads"],
            }
            for path, info in paths.items()
        ]
        options += [
            {"flags": flags, "flag": kind is bool, "choices": (), "reads": None}
            for kind, flags in common_kinds(bool(paths))
        ]
        reads = None if spec.positional is None else meta(paths[spec.positional])["reads"] or ""
        commands[name] = {"options": options, "positional": reads}
    return commands
