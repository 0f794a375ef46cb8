"""Typer commands made from settings models: every option, its help and its panel stand in the model alone."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.commands import leaf_paths
from tisdpo_cli.settings.fields import meta
from tisdpo_cli.settings.names import second_names

# Groups of options in the order in which the help shows them.
_PANELS = (
    "Model",
    "Data",
    "Stages",
    "Method",
    "Steps before the transform",
    "Token weights",
    "Optimisation",
    "Memory",
    "Evaluation",
    "Samples",
    "Rewards",
    "View",
    "Checks",
    "Runtime",
)


@dataclass(frozen=True)
class Common:
    """The options that every command has and that are no settings."""

    config: Path | None
    sets: list[str]
    print_config: bool
    as_json: bool


def command_function(
    command: type[Command], body: Callable[[dict[str, Any], Common], None], positional: str | None = None
) -> Callable[..., None]:
    """A function that Typer turns into a command.

    Args:
        command: the settings model.
        body: gets the options that were given, by dotted setting name, and the common ones.
        positional: the setting that may also be given without its flag.
    """
    paths = leaf_paths(command)
    names = {path.replace(".", "__"): path for path in paths}

    def function(**given: Any) -> None:
        common = Common(given.pop("config"), given.pop("sets") or [], given.pop("print_config"), given.pop("as_json"))
        given.pop("debug")
        bare = given.pop("bare", None)
        flags = {names[name]: value for name, value in given.items() if value is not None}
        if bare is not None and positional is not None:
            if positional in flags:
                raise typer.BadParameter(f"{positional} is given twice")
            flags[positional] = bare
        body(flags, common)

    parameters = [_parameter(name, paths[path]) for name, path in names.items()]
    parameters.sort(key=lambda p: _PANELS.index(p.default.rich_help_panel))
    if positional is not None:
        parameters.insert(0, _positional(positional, paths[positional]))
    parameters += _common_parameters()
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    function.__doc__ = command.__doc__
    return function


def normalize_options(arguments: Sequence[str], commands: Mapping[str, type[Command]]) -> list[str]:
    """Arguments with underscores and second names of options replaced, so that commands of other tools can be pasted.

    They are no options of their own: the help would show three names for each. Values are left alone.
    """
    command = commands.get(arguments[0]) if arguments else None
    other = second_names(command) if command is not None else {}
    names = {
        f"--{name.replace('_', '-')}": "--" + path.rpartition(".")[2].replace("_", "-") for name, path in other.items()
    }
    made = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
            argument = names.get(name, name) + equals + value
        made.append(argument)
    return made


def _parameter(name: str, info: FieldInfo) -> inspect.Parameter:
    about = meta(info)
    bare = name.rpartition("__")[2].replace("_", "-")
    is_flag = info.annotation is bool
    short = [flag for flag in about["flags"] if not flag.startswith("--")]
    spellings = [f"--{bare}", *short]
    option = typer.Option(
        None,
        *spellings,
        help=escape(_help(info)),
        metavar=" " if is_flag else about["metavar"] or _metavar(info.annotation),
        show_default=False,
        rich_help_panel=about["panel"],
    )
    kind = Optional[bool] if is_flag else Optional[str]  # noqa: UP045 (Typer reads it at run time)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=option)


def _positional(name: str, info: FieldInfo) -> inspect.Parameter:
    argument = typer.Argument(None, metavar=name.upper(), help=escape(_help(info)), show_default=False)
    return inspect.Parameter("bare", inspect.Parameter.KEYWORD_ONLY, annotation=Optional[str], default=argument)  # noqa: UP045


def _help(info: FieldInfo) -> str:
    text = info.description or ""
    if info.is_required():
        return f"{text} (required)"
    default = info.default
    if default is None or isinstance(default, bool) or (isinstance(default, str) and not default.isprintable()):
        return text
    return f"{text} (default {default:g})" if isinstance(default, float) else f"{text} (default {default})"


def _metavar(annotation: Any) -> str:
    """`INT`, `NUMBER`, `a|b|c` or `TEXT` for the type of a setting."""
    if typing.get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    if parts and typing.get_origin(annotation) is not typing.Annotated:
        return _metavar(parts[0])
    if typing.get_origin(annotation) is typing.Annotated:
        return _metavar(parts[0])
    return {int: "INT", float: "NUMBER"}.get(annotation, "TEXT")


def _common_parameters() -> list[inspect.Parameter]:
    def option(
        name: str, kind: Any, default: Any, *spellings: str, text: str, metavar: str | None = None
    ) -> inspect.Parameter:
        made = typer.Option(
            default,
            *spellings,
            help=text,
            metavar=metavar,
            show_default=False,
            rich_help_panel="Configuration and output",
        )
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=made)

    return [
        option("config", Optional[Path], None, "--config", "-c", text="YAML file with settings", metavar="FILE"),  # noqa: UP045
        option(
            "sets",
            Optional[list[str]],  # noqa: UP045
            None,
            "--set",
            text="any setting, as name=value; may be repeated",
            metavar="NAME=VALUE",
        ),
        option(
            "print_config", bool, False, "--print-config", text="print all settings and where they come from, and stop"
        ),
        option("as_json", bool, False, "--json", text="print one JSON object on stdout"),
        option("debug", bool, False, "--debug", text="show a traceback on errors"),
    ]
