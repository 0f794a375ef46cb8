"""The words of a command line, put into the form that the command takes, so that those of other trainers can be pasted.

What is no option of the command goes beside it, to be judged with the settings of all sources, in one message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tisdpo_cli.cli.options import common_kinds, spellings
from tisdpo_cli.settings.base import leaf_paths
from tisdpo_cli.settings.commands import CommandSpec
from tisdpo_cli.settings.fields import meta
from tisdpo_cli.settings.foreign.rules import number_of
from tisdpo_cli.settings.names import second_names

_TRUTHS = ("true", "false")
# Options that other trainers give several words.
_LISTS = ("--lora-target", "--lora-modules-to-save")


@dataclass
class Arguments:
    """A command line.

    Attributes:
        words: what the command takes.
        further: other options, by name with underscores, with their values; True where there is none.
        faults: what cannot be understood.
    """

    words: list[str] = field(default_factory=list)
    further: list[tuple[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_arguments(typed: Sequence[str], commands: Mapping[str, CommandSpec]) -> Arguments:
    """Replace underscores and second names in options, and set aside what is no option of the command.

    Second names are no options in their own right: help would show three names for each. Values are left alone, also
    those that begin like an option.
    """
    spec = commands.get(typed[0]) if typed else None
    if spec is None:
        return Arguments([_dashed(word) if word.startswith("--") else word for word in typed])
    return _Reader(spec, typed).read()


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


class _Reader:
    """Reads the words of one command from left to right."""

    def __init__(self, spec: CommandSpec, typed: Sequence[str]) -> None:
        paths = leaf_paths(spec.settings)
        kinds = {flag: kind for kind, flags in common_kinds(bool(paths)) for flag in flags}
        kinds |= {flag: info.annotation for path, info in paths.items() for flag in spellings(path, info)}
        # Help comes before everything else.
        self._flags = {flag for flag, kind in kinds.items() if kind is bool} | {"-h", "--help"}
        self._settings = {flag for path, info in paths.items() for flag in spellings(path, info)}
        self._with_value = set(kinds) - self._flags
        self._names = {
            f"--{name.replace('_', '-')}": "--" + path.rpartition(".")[2].replace("_", "-")
            for name, path in second_names(spec.settings).items()
        }
        positional = spec.positional
        self._takes_rest = spec.takes_rest
        self._places = 0 if positional is None else len(typed) if meta(paths[positional])["many"] else 1
        self._takes_words = positional is not None
        self._rest = list(typed[1:])
        self._result = Arguments([typed[0]])

    def read(self) -> Arguments:
        """All words."""
        while self._rest:
            word = self._rest.pop(0)
            if word == "--":
                self._places_taken(["--", *self._rest] if self._takes_words else [], self._rest)
                break
            if word.startswith("--"):
                self._option(_dashed(word))
            elif word.startswith("-") and word != "-" and number_of(word) is None:
                self._short(word)
            elif self._takes_rest:
                # A whole command line, whose options are not ours.
                self._result.words += ["--", word, *self._rest]
                break
            else:
                self._places_taken([word], [word])
        return self._result

    def _places_taken(self, words: list[str], places: Sequence[str]) -> None:
        self._places -= len(places)
        if self._places < 0:
            self._result.faults.append(f"unexpected argument {' '.join(places)!r}")
        else:
            self._result.words += words

    def _option(self, word: str) -> None:
        name, equals, value = word.partition("=")
        name = self._names.get(name, name)
        if name in self._with_value:
            self._value(name, value if equals else None)
        elif name in self._flags:
            self._flag(name, value if equals else None)
        else:
            self._result.further.append((_bare(name), value if equals else self._values()))

    def _value(self, name: str, value: str | None) -> None:
        if value is not None:
            self._result.words.append(f"{name}={value}")
            return
        if not self._rest:
            self._result.faults.append(f"{name} needs a value")
            return
        first = self._rest.pop(0)
        several = [first, *self._following()] if name in _LISTS else [first]
        self._result.words += [name, ",".join(several)]

    def _flag(self, name: str, value: str | None) -> None:
        if value is None and self._rest and self._rest[0].lower() in _TRUTHS:
            value = self._rest.pop(0)
        if value is None or (name not in self._settings and value.lower() == "true"):
            self._result.words.append(name)
        elif name in self._settings:
            # The command's own flags take no value.
            self._result.further.append((_bare(name), value))
        elif value.lower() != "false":
            self._result.faults.append(f"{name} takes no value")

    def _short(self, word: str) -> None:
        name = word[:2]
        if name in self._with_value and len(word) == 2:
            self._value(name, None)
        elif name in self._with_value | self._flags:
            self._result.words.append(word)
        else:
            self._result.faults.append(f"No such option: {word}")

    def _values(self) -> Any:
        """The values of an option that the command has not."""
        if self._takes_words:
            is_value = bool(self._rest) and _is_value(self._rest[0])
            return self._rest.pop(0) if is_value else True
        values = self._following()
        return values if len(values) > 1 else values[0] if values else True

    def _following(self) -> list[str]:
        values = []
        while self._rest and _is_value(self._rest[0]):
            values.append(self._rest.pop(0))
        return values


def _is_value(word: str) -> bool:
    return not word.startswith("-") or number_of(word) is not None


def _bare(name: str) -> str:
    return name[2:].replace("-", "_")
