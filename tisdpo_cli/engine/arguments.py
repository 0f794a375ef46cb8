"""Settings as plain arguments: what the entry points of the engine hand to the functions below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tisdpo_cli.data.pairs import Columns
from tisdpo_cli.data.reader import find_splits
from tisdpo_cli.data.scored import read_manifest
from tisdpo_cli.data.splits import ReadOptions
from tisdpo_cli.data.tokens import Limits, Vocabulary
from tisdpo_cli.model.directory import content_hashes
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.stage import OutputRequest
from tisdpo_cli.settings.groups import ColumnOptions, Data
from tisdpo_cli.settings.inspect_weights import InspectWeights
from tisdpo_cli.settings.train_pairs import TrainPairs

Scored = TypeVar("Scored", TrainPairs, InspectWeights)


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


def vocabulary_of(tokenizer: Tokenizer, at_start: bool = False) -> Vocabulary:
    """What tokenization needs of a tokenizer.

    Args:
        tokenizer: of the model in use.
        at_start: whether responses are encoded as at the start of a text; see `Tokenizer.encode_responses`.
    """

    def responses(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer.encode_responses(texts, at_start)

    def marker(text: str) -> str | None:
        return None if tokenizer.parses_data else tokenizer.texts.marker(text)

    return Vocabulary(tokenizer.encode_prompts, responses, tokenizer.bos, tokenizer.eos, marker)


def read_options(data: Data) -> ReadOptions:
    """How rows are read and cut."""
    return ReadOptions(columns_of(data), data.on_bad_row, limits_of(data), parses(data))


def parses(data: ColumnOptions) -> bool:
    """Whether special tokens spelled out in rows become these tokens."""
    return data.special_tokens_in_data == "parse"


# What a scored dataset records of how its rows were read.
_RECORDED = ("prompt_column", "chosen_column", "rejected_column", "special_tokens_in_data")


def recorded_reading(data: ColumnOptions) -> dict[str, str]:
    """How rows are read, for the manifest of a scored dataset."""
    return {name: getattr(data, name) for name in _RECORDED}


def with_recorded_reading(settings: Scored, dataset: str) -> Scored:
    """The settings with the columns that a scored dataset records, unless the user gives others.

    Args:
        settings: of a command that reads a scored dataset.
        dataset: path of the dataset.
    """
    manifest = read_manifest(Path(dataset).expanduser()) or {}
    recorded, given = manifest.get("reading"), settings.data.model_fields_set
    if not isinstance(recorded, dict):
        return settings
    values = {f"data.{name}": str(recorded[name]) for name in _RECORDED if name in recorded and name not in given}
    return settings.with_values(values)  # type: ignore[return-value]


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
