"""Settings as a command line: the options that shape the result, as others can read them."""

from __future__ import annotations

import shlex
from pathlib import PurePath
from typing import Any

from tisdpo_cli.settings.base import Command, leaf_paths
from tisdpo_cli.settings.datasets import parts_of, words_of
from tisdpo_cli.settings.fields import meta, shapes_result

# Compared by content, so it shapes the result though its name does not.
_FILES = ("data.chat_template",)


def option_words(path: str, value: Any) -> list[str]:
    """A setting as words of a command line.

    Args:
        path: its dotted name.
        value: its value, no default.
    """
    option = "--" + path.rpartition(".")[2].replace("_", "-")
    if isinstance(value, bool):
        return [option] if value else [option, "false"]
    return [option, str(value)]


def command_line(settings: Command, output: str) -> str:
    """The command line that makes the same result again, without what says something about this machine.

    Args:
        settings: of a command that creates an output.
        output: what stands for its output directory.
    """
    words = ["tisdpo", settings.command]
    fields = leaf_paths(type(settings))
    for path, info, value in settings.leaves():
        if value == fields[path].default or not (shapes_result(info) or meta(info)["reads"] or path in _FILES):
            continue
        if meta(info)["many"]:
            words += _dataset_words(value)
        else:
            named = meta(info)["reads"] or path in _FILES
            words += option_words(path, shown_path(value) if named else value)
    return shlex.join([*words, "--output-dir", output])


def _dataset_words(value: Any) -> list[str]:
    if any(part.own() for part in parts_of(value)):
        # A command line cannot say how each dataset is read.
        return ["--dataset", "DATASET"]
    return [word for text in words_of(value) for word in ("--dataset", shown_path(text))]


def shown_path(name: str) -> str:
    """A path or hub id for others to read: as given, and of an absolute path the last part alone.

    >>> shown_path("/home/me/models/sft"), shown_path("out/sft"), shown_path("owner/model")
    ('sft', 'out/sft', 'owner/model')
    """
    path = PurePath(name)
    return path.name or name if path.is_absolute() or name.startswith("~") else name
