"""The command that usually follows, ready to paste: `MODEL` and `out/…` stand for what only the user knows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tisdpo_cli.settings.base import Command, leaf_paths
from tisdpo_cli.settings.command_lines import option_words
from tisdpo_cli.settings.commands import COMMANDS, CommandSpec
from tisdpo_cli.settings.datasets import parts_of, words_of
from tisdpo_cli.settings.fields import meta
from tisdpo_cli.settings.groups import Data, TrainingData


def next_command(
    spec: CommandSpec, settings: Command, flags: Mapping[str, Any], config: Path | None, sets: list[str]
) -> str:
    """Fill in the template of a command.

    Its fields are `{model}`, `{dataset}` and `{output}`; `{data_options}` and `{weights_options}`, which must stay the
    same in every stage, as far as the next command has them; `{scored_options}`, which are these without those that
    a scored dataset already reflects; `{options}`, all options of this command; `{tokenizer}`, if there is none beside
    the dataset.

    Args:
        spec: of the command that has run, with a template.
        settings: of the command.
        flags: its options, by dotted setting name.
        config: its config file.
        sets: its `--set` options.
    """
    assert spec.next is not None
    output, dataset = getattr(settings, "output_dir", ""), getattr(settings, "dataset", "")
    words = words_of(dataset)
    if any(part.own() for part in parts_of(dataset)):
        # A command line cannot say how each dataset is read.
        words = ["DATASET"]
    options = repeated_options(spec.settings, flags)
    options += "".join(f" --set {shlex.quote(item)}" for item in sets)
    options += f" --config {shlex.quote(str(config))}" if config is not None else ""
    following = leaf_paths(COMMANDS[spec.next.split()[1]].settings)
    data = {path: value for path, value in flags.items() if path.startswith("data.") and path in following}
    reflected = {**TrainingData.of_scored_dataset(), **(Data.of_mixture() if len(words) > 1 else {})}
    scored = {path: value for path, value in data.items() if path not in reflected}
    beside = Path(words[0]).expanduser() / "tokenizer_config.json"
    return spec.next.format(
        # Two contrastive models do not tell their starting model.
        model=shlex.quote(getattr(settings, "model", None) or "MODEL"),
        dataset=" --dataset ".join(map(shlex.quote, words)),
        output=shlex.quote(output),
        data_options=repeated_options(spec.settings, data),
        scored_options=repeated_options(spec.settings, scored),
        weights_options=repeated_options(spec.settings, flags, "weights."),
        options=options,
        tokenizer="" if beside.is_file() else f" --tokenizer {shlex.quote(output)}",
    )


def repeated_options(command: type[Command], flags: Mapping[str, Any], prefix: str = "") -> str:
    """The given options to repeat in the next command, with a leading space; those of a group if `prefix` names one."""
    settings = leaf_paths(command)
    words: list[str] = []
    for path, value in flags.items():
        if path.startswith(prefix) and value is not None and meta(settings[path]).get("repeated", True):
            words += option_words(path, value)
    return "".join(f" {shlex.quote(word)}" for word in words)
