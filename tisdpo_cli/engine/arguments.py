"""Settings as plain arguments: what the entry points of the engine hand to the functions below them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from tisdpo_cli.data.chat_tokens import ChatOptions
from tisdpo_cli.data.dataset import Columns, DatasetSplit, Part
from tisdpo_cli.data.locate import TEST, TRAIN, find_splits, named_split, test_split, training_splits
from tisdpo_cli.data.row_store import RowStore
from tisdpo_cli.data.scored import read_manifest
from tisdpo_cli.data.splits import ReadOptions
from tisdpo_cli.data.tokens import Limits
from tisdpo_cli.engine.chat import DEFAULT_DAY
from tisdpo_cli.errors import UsageError
from tisdpo_cli.files import RUN_FILE, sha256
from tisdpo_cli.model.content_hashes import content_hashes
from tisdpo_cli.model.directory import base_of, locate_model
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.stage import OutputRequest
from tisdpo_cli.settings.datasets import DatasetPart, parts_of
from tisdpo_cli.settings.estimate import CONTRAST, Estimate
from tisdpo_cli.settings.groups import ColumnOptions, Data, TrainingData
from tisdpo_cli.settings.inspect_weights import InspectWeights
from tisdpo_cli.settings.train_pairs import TrainPairs

Scored = TypeVar("Scored", TrainPairs, InspectWeights)
AnyData = TypeVar("AnyData", bound=Data)


def find_dataset(
    dataset: str | Sequence[DatasetPart], data: TrainingData, reporter: Reporter
) -> dict[str, DatasetSplit]:
    """The splits in use, `train` and perhaps `test`, with a note if the choice needs one; see `training_splits`."""
    parts: dict[str, list[Part]] = {TRAIN: [], TEST: []}
    for part in parts_of(dataset):
        own = _for_part(part, data)
        files = training_splits(part.path, own.split, own.eval_split, own.eval_size is not None)
        for notice in files.notices:
            reporter.note(notice)
        columns, limits = columns_of(own), {TRAIN: part.limit, TEST: None}
        for role, path in files.items():
            parts[role].append(Part(part.path, path, columns, limits[role], part.share if role == TRAIN else None))
    train = DatasetSplit(tuple(parts[TRAIN]), data.limit, data.eval_size)
    if data.eval_size is not None:
        return {TRAIN: train, TEST: replace(train, for_test=True)}
    return {TRAIN: train, **({TEST: DatasetSplit(tuple(parts[TEST]), for_test=True)} if parts[TEST] else {})}


def evaluated_split(dataset: str | Sequence[DatasetPart], name: str | None, data: Data) -> tuple[str, DatasetSplit]:
    """The split to evaluate on, by default the test split if there is one, with its name."""
    parts, names = [], []
    for part in parts_of(dataset):
        found = find_splits(part.path)
        names.append(name or test_split(found) or TRAIN)
        path = named_split(found, names[-1], part.path, "--split")
        parts.append(Part(part.path, path, columns_of(_for_part(part, data))))
    return ", ".join(dict.fromkeys(names)), DatasetSplit(tuple(parts), for_test=True)


def _for_part(part: DatasetPart, data: AnyData) -> AnyData:
    """The settings for a dataset of a mixture."""
    own = {name: value for name, value in part.own().items() if name in type(data).model_fields}
    if own.get("data_format", data.data_format) not in ("pairs", "scored-pairs"):
        names = ("prompt_column", "chosen_column", "rejected_column")
        own = {**{name: ColumnOptions.model_fields[name].default for name in names}, **own}
    return data.model_copy(update=own)


def columns_of(data: ColumnOptions) -> Columns:
    """The column names of the settings."""
    data_format = data.data_format if isinstance(data, Data) else "pairs"
    return Columns(data.prompt_column, data.chosen_column, data.rejected_column, data.dialogue == "hh", data_format)


def limits_of(data: Data) -> Limits:
    """The length limits of the settings."""
    return Limits(data.max_length, data.max_prompt_length, data.keep_prompt)


def read_options(data: Data, reporter: Reporter, cache_dir: str | None = None) -> ReadOptions:
    """How rows are read and cut, and where they are kept.

    Args:
        data: the settings.
        reporter: of this process.
        cache_dir: where rows and tokens are kept, or None for the user's cache directory.
    """
    directory = Path(cache_dir).expanduser() if cache_dir is not None else None
    store = RowStore(directory, reporter.warn, reporter.progress, note=reporter.note)
    return ReadOptions(data.on_bad_row, limits_of(data), parses(data), chat_options(data), store=store)


def reads_first(settings: Any) -> bool:
    """Whether rows are read before the processes of a run join: one reads for all, for longer than others can wait in a
    collective call.

    A process that is alone claims its output first, which may be all that there is to do, or an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    finished = (Path(settings.output_dir).expanduser() / RUN_FILE).is_file()
    return not finished or settings.overwrite or getattr(settings, "dry_run", False)


def chat_options(data: ColumnOptions) -> ChatOptions:
    """How conversations are rendered.

    Raises:
        UsageError: the file of the template cannot be read.
    """
    template = None
    if data.chat_template is not None:
        try:
            template = Path(data.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UsageError(f"cannot be read: {reason}", where=f"--chat-template {data.chat_template}") from error
    day = date.fromisoformat(data.chat_date) if data.chat_date is not None else DEFAULT_DAY
    return ChatOptions(template, data.template_variables(), day)


def parses(data: ColumnOptions) -> bool:
    """Whether special tokens spelled out in rows become these tokens."""
    return data.special_tokens_in_data == "parse"


def _template_hash(data: ColumnOptions) -> dict[str, str]:
    """The content of the chat template of the settings, which is compared by content, not by name."""
    if data.chat_template is None:
        return {}
    return {"content of chat_template": sha256(Path(data.chat_template).expanduser())}


# What a scored dataset records of how its rows were read.
_RECORDED = (
    "prompt_column", "chosen_column", "rejected_column", "special_tokens_in_data", "dialogue", "chat_template_kwargs",
    "chat_date",
)  # fmt: skip


def recorded_reading(dataset: str | Sequence[DatasetPart], data: Data) -> dict[str, Any]:
    """How the rows of a scored dataset are read, for its manifest."""
    parts = parts_of(dataset)
    # What is written are pairs, whatever they were made of, and with the columns of no part if there are several.
    plain = {name: default for path, default in Data.of_mixture().items() for name in [path.rpartition(".")[2]]}
    own = {name: getattr(_for_part(parts[0], data), name) for name in _RECORDED}
    return {**own, **(plain if len(parts) > 1 else {}), "data_format": "pairs"}


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
    values = {f"data.{name}": recorded[name] for name in _RECORDED if name in recorded and name not in given}
    if isinstance(settings.data, Data):
        values["data.data_format"] = "pairs"
    return settings.with_values(values)  # type: ignore[return-value]


def contrast_paths(settings: Estimate) -> dict[str, Path]:
    """The directories of the models that `estimate` compares, by the name of their option.

    Raises:
        UsageError: there is no such model.
    """
    options = ["model"] if settings.model is not None else list(CONTRAST)
    return {name: locate_model(getattr(settings, name), f"--{name}", settings.trust_remote_code) for name in options}


def scoring_request(
    runtime: Runtime, settings: Estimate, models: Mapping[str, Path | None], splits: Mapping[str, DatasetSplit]
) -> OutputRequest:
    """The output that `estimate` creates; see `output_request`."""
    precision = runtime.precision(settings.dtype, scoring=True)
    return output_request(settings, {"dtype": precision}, models, splits.values())


def output_request(
    settings: Any, resolved: Mapping[str, Any], models: Mapping[str, Path | None], splits: Iterable[DatasetSplit]
) -> OutputRequest:
    """The output that a command creates.

    Args:
        settings: of the command.
        resolved: settings whose value depends on the machine or on other settings, as they are in force.
        models: option name to directory of the models it reads, or None.
        splits: what it reads of the dataset.
    """
    read = [path for path in models.values() if path is not None]
    files = list(dict.fromkeys(path for split in splits for path in split.paths))
    resume = settings.resume if hasattr(settings, "resume") else settings.checkpoints.resume
    return OutputRequest(
        path=Path(settings.output_dir),
        command=settings.command,
        fingerprint={**settings.fingerprint(), **resolved},
        inputs=[*read, *map(base_of, read), *files],
        content_hashes=lambda: {**content_hashes(models, files), **_template_hash(settings.data)},
        overwrite=settings.overwrite,
        restart=resume == "never",
    )
