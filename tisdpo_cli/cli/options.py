"""Typer commands made from the settings: every option, its help and its panel are defined in the settings alone."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import typer
from pydantic.fields import FieldInfo

from tisdpo_cli.settings.base import leaf_paths
from tisdpo_cli.settings.commands import CommandSpec
from tisdpo_cli.settings.fields import meta

_LONGEST_CHOICES = 48
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


@dataclass(frozen=True)
class Invocation:
    """What the user typed.

    Attributes:
        flags: the options, by dotted setting name.
        config: the config file, or None.
        sets: the values of `--set`.
        further: options that the command has not, by name, with their values.
        faults: what is wrong with the command line itself.
    """

    flags: Mapping[str, Any]
    config: Path | None
    sets: list[str]
    print_config: bool
    schema: bool
    as_json: bool
    further: Sequence[tuple[str, Any]] = ()
    faults: Sequence[str] = ()


def command_function(spec: CommandSpec, body: Callable[[CommandSpec, Invocation], None]) -> Callable[..., None]:
    """A function that Typer turns into a command.

    Args:
        spec: of the command.
        body: called with the spec and what the user typed.
    """
    paths = leaf_paths(spec.settings)
    names = {path.replace(".", "__"): path for path in paths}
    positional = spec.positional

    def function(context: typer.Context, **given: Any) -> None:
        common = {name: given.pop(name, default) for name, default in _COMMON_DEFAULTS.items()}
        common.pop("debug")
        bare = given.pop("bare", None) or None
        flags = {names[name]: value for name, value in given.items() if value is not None and value != []}
        if bare not in (None, []) and positional is not None:
            if positional in flags:
                raise typer.BadParameter(f"{positional} is given twice")
            flags[positional] = bare
        # What was typed beside the options of the command, if it comes from a command line.
        beside = context.obj
        further, faults = ((), ()) if beside is None else (tuple(beside.further), tuple(beside.faults))
        config, sets = common.pop("config"), common.pop("sets") or []
        body(spec, Invocation(flags, config, sets, **common, further=further, faults=faults))

    parameters = [_parameter(name, paths[path]) for name, path in names.items()]
    if positional is not None:
        kind = Optional[list[str]] if meta(paths[positional])["many"] else Optional[str]  # noqa: UP045
        argument = typer.Argument(None, metavar=positional.upper())
        parameters.insert(0, _keyword("bare", kind, argument))
    parameters.insert(0, inspect.Parameter("context", _POSITIONAL, annotation=typer.Context))
    parameters += [
        _keyword(name, kind, typer.Option(default, *flags))
        for name, (kind, default, flags) in _common(bool(paths)).items()
    ]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    function.__doc__ = spec.settings.__doc__
    return function


def _keyword(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)


def _parameter(name: str, info: FieldInfo) -> inspect.Parameter:
    is_flag, many = info.annotation is bool, meta(info)["many"]
    first, *others = spellings(name, info)
    if is_on_by_default(info):
        first, *others = f"{first}/{others[0]}", *others[1:]
    option = typer.Option(None, first, *others, metavar=metavar(info))
    # Typer reads the annotation at run time.
    kind = Optional[bool] if is_flag else Optional[list[str]] if many else Optional[str]  # noqa: UP045
    return _keyword(name, kind, option)


def spellings(name: str, info: FieldInfo) -> list[str]:
    """The spellings of an option that help shows: the long one, the one that switches it off, and the short one."""
    bare = name.replace("__", ".").rpartition(".")[2].replace("_", "-")
    off = [f"--no-{bare}"] if is_on_by_default(info) else []
    return [f"--{bare}", *off, *(flag for flag in meta(info)["flags"] if not flag.startswith("--"))]


def is_on_by_default(info: FieldInfo) -> bool:
    """Whether a setting is a flag that can only be switched off."""
    return info.annotation is bool and info.default is True


def metavar(info: FieldInfo) -> str:
    """`INT`, `NUMBER`, `a|b|c`, `NAME` or `TEXT` for the type of a setting; empty for a flag."""
    if info.annotation is bool:
        return ""
    choices = "|".join(choices_of(info.annotation))
    if choices:
        return choices if len(choices) <= _LONGEST_CHOICES else "NAME"
    return meta(info)["metavar"] or _type_name(info.annotation)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The choices of a setting, or none."""
    if typing.get_origin(annotation) is Literal:
        return tuple(str(choice) for choice in typing.get_args(annotation))
    # The choices of Annotated[Literal, …] and Literal | None come first.
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    return choices_of(inner[0]) if inner else ()


def _type_name(annotation: Any) -> str:
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    return _type_name(inner[0]) if inner else {int: "INT", float: "NUMBER"}.get(annotation, "TEXT")


# Options that every command has and that are no settings: name to type, default and flags.
_Common = dict[str, tuple[Any, Any, tuple[str, ...]]]
_FOR_SETTINGS: _Common = {
    "config": (Optional[Path], None, ("--config", "-c")),  # noqa: UP045
    "sets": (Optional[list[str]], None, ("--set",)),  # noqa: UP045
    "print_config": (bool, False, ("--print-config",)),
    "schema": (bool, False, ("--schema",)),
}
_FOR_ALL: _Common = {
    "as_json": (bool, False, ("--json",)),
    "debug": (bool, False, ("--debug",)),
}
_COMMON_DEFAULTS = {name: default for name, (_, default, _) in (_FOR_SETTINGS | _FOR_ALL).items()}

COMMON_HELP = {
    "config": ("-c, --config FILE", "YAML file with settings"),
    "sets": ("--set NAME=VALUE", "set any setting; may be repeated"),
    "print_config": ("--print-config", "print all settings with their origin, and exit"),
    "schema": ("--schema", "print the JSON schema of the config file, and exit"),
    "as_json": ("--json", "print one JSON object to stdout"),
    "debug": ("--debug", "show a traceback on errors"),
}


def _common(has_settings: bool) -> _Common:
    return _FOR_SETTINGS | _FOR_ALL if has_settings else _FOR_ALL


def common_kinds(has_settings: bool) -> list[tuple[Any, tuple[str, ...]]]:
    """Type and spellings of the options that every command has."""
    return [(kind, flags) for kind, _, flags in _common(has_settings).values()]


def common_names(has_settings: bool) -> list[str]:
    """Names of the options that every command has, in the order of help."""
    return list(_common(has_settings))
