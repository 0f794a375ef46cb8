"""One source of values at a time: its names become dotted names of settings, those of other trainers too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tisdpo_cli.settings.base import Command, leaf_paths
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.fields import group_of, meta
from tisdpo_cli.settings.foreign.rules import Outcome, plain
from tisdpo_cli.settings.foreign.table import foreign, foreign_options, foreign_value
from tisdpo_cli.settings.names import case, did_you_mean, locate, names
from tisdpo_cli.settings.run import STAGES, Run

ENV_PREFIX = "TISDPO_"
# Options that are no settings.
_COMMON = ("config", "set", "print_config", "schema", "json", "debug", "help")


@dataclass
class Findings:
    """What reading found, of all sources.

    Attributes:
        faults: why the settings cannot be used.
        notices: what the user should know.
        off: foreign options that ask for nothing, as they are spelled.
    """

    faults: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    off: list[str] = field(default_factory=list)

    def lines(self) -> tuple[str, ...]:
        """The notices; what asks for nothing takes one line together."""
        together = f"already so here: {', '.join(dict.fromkeys(self.off))}"
        return (*dict.fromkeys(self.notices), *([together] if self.off else []))


@dataclass(frozen=True)
class Source:
    """How a source calls its settings.

    Attributes:
        where: in front of a fault.
        spell: a name as the user wrote it.
        unknown: the fault of an unknown name, without `where`.
        shared: whether the values are for all commands, so that what this one has not is left alone.
    """

    where: str
    spell: Callable[[str], str]
    unknown: Callable[[type[Command], str], str]
    shared: bool = False


def _unknown_setting(command: type[Command], name: str) -> str:
    return f"unknown setting {name!r}{did_you_mean(name, names(command))}"


def _unknown_option(command: type[Command], name: str) -> str:
    known = {option(other) for other in (*names(command), *_COMMON)}
    return f"No such option: {option(name)}{did_you_mean(option(name), known)}"


def option(name: str) -> str:
    """A bare or dotted name as an option."""
    return "--" + name.rpartition(".")[2].replace("_", "-")


FLAGS = Source("", option, _unknown_option)
_SETS = Source("--set ", lambda name: f"--set {name}", _unknown_setting)


def variable_of(name: str) -> str:
    """The variable of a bare or dotted name."""
    return f"{ENV_PREFIX}{name.upper().replace('.', '__')}"


def file_source(path: Any) -> Source:
    """A config file."""
    return Source(f"{path}: ", lambda name: f"{path}: {name}", _unknown_setting)


def from_sets(command: type[Command], sets: Sequence[str], found: Findings) -> dict[str, Any]:
    """The values of `--set NAME=VALUE`."""
    values: dict[str, Any] = {}
    for item in sets:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            found.faults.append(f"--set {item!r}: write --set name=value")
            continue
        values[name.strip()] = _scalar(text)
    return flatten(command, walk(command, values), _SETS, found)


def from_environment(command: type[Command], environ: Mapping[str, str], found: Findings) -> dict[str, Any]:
    """The values of `TISDPO_*` variables that this command has; unknown to all commands is a fault."""
    values: list[tuple[str, Any]] = []
    spelled: dict[str, str] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable[len(ENV_PREFIX) :].lower().replace("__", ".")
        mine = case(command, name)
        if mine is not None or _is_foreign(command, name):
            values.append((mine or name, _scalar(text)))
            spelled[mine or name] = variable
        elif not is_variable(name):
            variables = {variable_of(n) for spec in COMMANDS.values() for n in names(spec.settings)}
            found.faults.append(f"unknown environment variable {variable}{did_you_mean(variable, variables)}")
    source = Source("environment: ", lambda name: spelled[name], _unknown_setting, shared=True)
    return flatten(command, values, source, found)


def is_variable(name: str) -> bool:
    """Whether any command has a setting of this lower-case name, or another trainer an option."""
    return any(case(spec.settings, name) for spec in COMMANDS.values()) or _is_foreign(Run, name)


def _scalar(text: str) -> Any:
    return None if text.strip().lower() in ("null", "~") else text


def walk(command: type[Command], values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested values by dotted name."""
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('-', '_')}"
        whole = name.rpartition(".")[2] in _json_settings(command) or (
            _is_foreign(command, name) and not _is_section(command, name)
        )
        if isinstance(value, Mapping) and value and not whole:
            yield from walk(command, value, f"{name}.")
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


def _stage_of(command: type[Command], name: str) -> tuple[str, str]:
    """The stage of `run` in front of a name, with its dot, and the rest."""
    stage, dot, rest = name.partition(".")
    return (f"{stage}.", rest) if dot and issubclass(command, Run) and stage in STAGES else ("", name)


def _is_foreign(command: type[Command], name: str) -> bool:
    return locate(command, name) is None and _stage_of(command, name)[1] in foreign_options()


def _positive(command: type[Command], name: str, value: Any) -> tuple[str, Any]:
    """`no_x` as x with the other truth: so transformers spells what is on by default."""
    other = name.removeprefix("no_")
    truth = plain(value)
    if other == name or locate(command, name) is not None or not isinstance(truth, bool):
        return name, value
    return (other, not truth) if locate(command, other) or _is_foreign(command, other) else (name, value)


def flatten(
    command: type[Command], pairs: Iterable[tuple[str, Any]], source: Source, found: Findings
) -> dict[str, Any]:
    """Values by the dotted names of their settings.

    Args:
        command: whose settings.
        pairs: names, bare or dotted, also those of other trainers, and values.
        source: where they come from.
        found: gets unknown, refused and repeated names, and what the user should know.
    """
    layer = _LayerOfSource(command, source, found)
    for typed, given in pairs:
        name, value = _positive(command, typed, given)
        path = locate(command, name)
        stage, bare = _stage_of(command, name)
        if name in STAGES:
            found.faults.append(f"{source.where}{name} is a section, not a value")
            continue
        outcome = foreign(bare, value) if path is None else foreign_value(path.rpartition(".")[2], value)
        if outcome is not None:
            layer.apply(outcome, name, stage)
        elif path is None:
            found.faults.append(source.where + source.unknown(command, name))
        else:
            layer.put(path, value, name)
    return layer.finished()


class _LayerOfSource:
    """The values of one source as they are found."""

    def __init__(self, command: type[Command], source: Source, found: Findings) -> None:
        self._command, self._source, self._found = command, source, found
        self._values: dict[str, Any] = {}
        self._soft: dict[str, Any] = {}
        # The name under which a setting may be given once, to its dotted name and the name that was translated.
        self._seen: dict[str, tuple[str, str]] = {}

    def put(self, path: str, value: Any, name: str, translated: bool = False) -> None:
        """Set a setting; twice is a fault, unless a translation says the same."""
        key = _once(self._command, path)
        if key in self._seen:
            before, other = self._seen[key]
            if not (translated or other) or str(self._values[before]) != str(value):
                self._found.faults.append(f"{self._source.where}{path} is given twice, once as {other or name!r}")
            return
        self._seen[key] = (path, name if translated else "")
        self._values[path] = value

    def apply(self, outcome: Outcome, name: str, stage: str) -> None:
        """Do what an option of another trainer stands for."""
        spelled = self._source.spell(name)
        if outcome.fault:
            self._found.faults.append(f"{spelled}: {outcome.fault}")
            return
        if not (outcome.values or outcome.soft or outcome.notice):
            self._found.off.append(spelled)
        paths = {setting: self._path_of(stage, setting) for setting in (*outcome.values, *outcome.soft)}
        missing = [setting for setting in outcome.values if paths[setting] is None]
        if missing and not self._source.shared:
            self._found.faults.append(f"{spelled}: {self._command.command} has no {option(missing[0])}")
            return
        if outcome.notice and not missing:
            self._found.notices.append(f"{spelled}: {outcome.notice}")
        for setting, value in outcome.values.items():
            if (path := paths[setting]) is not None:
                self.put(path, value, name, translated=True)
        self._soft |= {path: value for setting, value in outcome.soft.items() if (path := paths[setting]) is not None}

    def _path_of(self, stage: str, setting: str) -> str | None:
        path = locate(self._command, stage + setting)
        # A variable is for all commands: it means those with such a group.
        elsewhere = not self._source.shared
        return path or (locate(self._command, stage + setting.rpartition(".")[2]) if elsewhere else None)

    def finished(self) -> dict[str, Any]:
        """All values."""
        taken = {path: value for path, value in self._soft.items() if _once(self._command, path) not in self._seen}
        return self._values | taken


def _once(command: type[Command], path: str) -> str:
    """The name under which a setting may be given once: the bare name for shared settings of `run`."""
    shared = issubclass(command, Run) and path.partition(".")[0] not in STAGES
    return path.rpartition(".")[2] if shared else path
