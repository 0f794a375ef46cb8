"""Settings as plain arguments: what the entry points of the engine hand to the functions below them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tisdpo_cli.data.pairs import Columns
from tisdpo_cli.data.reader import find_splits
from tisdpo_cli.data.splits import ReadOptions
from tisdpo_cli.data.tokens import Limits, Vocabulary
from tisdpo_cli.model.directory import content_hashes
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.stage import OutputRequest
from tisdpo_cli.settings.groups import ColumnOptions, Data


def find_dataset(dataset: str, reporter: Reporter) -> dict[str, Path]:
    """Split name to its file, with a note if the choice needs one; see `find_splits`."""
    files = find_splits(dataset)
    for notice in files.notices:
        reporter.note(notice)
    return files


def columns_of(data: ColumnOptions) -> Columns:
    """The column names of the settings."""
    return Columns(data.prompt_column, data.chosen_column, data.rejected_column)


def limits_of(data: Data) -> Limits:
    """The length limits of the settings."""
    return Limits(data.max_length, data.max_prompt_length, data.keep_prompt)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """What tokenisation needs of a tokenizer."""
    return Vocabulary(tokenizer.encode, tokenizer.bos, tokenizer.eos)


def read_options(data: Data) -> ReadOptions:
    """How rows are read and cut."""
    return ReadOptions(columns_of(data), data.on_bad_row, limits_of(data))


def output_request(
    settings: Any, resolved: Mapping[str, Any], models: Mapping[str, Path | None], files: Mapping[str, Path]
) -> OutputRequest:
    """The output that a command creates.

    Args:
        settings: of the command.
        resolved: settings whose value depends on the machine or on other settings, as they are in force.
        models: option name to directory of the models it reads, or None.
        files: split name to file of the dataset it reads.
    """
    resume = settings.resume if hasattr(settings, "resume") else settings.checkpoints.resume
    return OutputRequest(
        path=Path(settings.output_dir),
        command=settings.command,
        fingerprint={**settings.fingerprint(), **resolved},
        inputs=[path for path in (*models.values(), *files.values()) if path is not None],
        content_hashes=lambda: content_hashes(models, files),
        overwrite=settings.overwrite,
        restart=resume == "never",
    )
