"""The value of `--dataset`: one dataset, or a mixture of several, each with its share and with how it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationError, WithJsonSchema

from tisdpo_cli.formats import DataFormat
from tisdpo_cli.settings.fields import Group, PathText, PositiveFloat, PositiveInt, setting

_WITH_SHARE = re.compile(r"(?P<path>.+)=(?P<share>[0-9.]+)")


def _own(help_text: str, **more: Any) -> Any:
    return setting(None, help_text, "Data", **more)


class DatasetPart(Group):
    """A dataset of a mixture. What it leaves out is as for all datasets."""

    path: PathText = setting(..., "path or hub id", "Data", shapes_result=False, metavar="PATH")
    share: PositiveFloat | None = _own("share of the mixture, in proportion to the other shares")
    prompt_column: PathText | None = _own("name of the prompt column")
    chosen_column: PathText | None = _own("name of the column with the preferred response")
    rejected_column: PathText | None = _own("name of the column with the other response")
    data_format: DataFormat | None = _own("what a row holds")
    dialogue: Literal["none", "hh"] | None = _own("hh: texts are dialogues, to be read as messages")
    split: PathText | None = _own("split to train on")
    eval_split: PathText | None = _own("split to evaluate on")
    limit: PositiveInt | None = _own("use only the first N rows of the training split")

    def own(self) -> dict[str, Any]:
        """What is given for this dataset alone, by the name of the setting for all."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name not in ("path", "share")}
        return {name: value for name, value in values.items() if value is not None}

    def plain(self) -> dict[str, Any] | str:
        """The value to write: the path alone where nothing else is given."""
        given = {name: value for name, value in self.model_dump().items() if value is not None}
        return given if len(given) > 1 else self.path


def _read(value: Any) -> Any:
    """One dataset as text, or the parts of a mixture."""
    if not isinstance(value, (list, tuple)):
        return _read([value]) if isinstance(value, str) else value
    parts = tuple(_part(item, f"dataset {number}") for number, item in enumerate(value, start=1))
    if not parts:
        raise ValueError("the list of datasets is empty")
    shares = [part.share is not None for part in parts]
    if shares == [True]:
        raise ValueError("a share needs several datasets: give --dataset PATH=SHARE for each")
    if any(shares) and not all(shares):
        raise ValueError("give a share to every dataset of a mixture, or to none")
    if len(parts) > 1:
        return parts
    if parts[0].own():
        raise ValueError("a list of one dataset: give its settings beside --dataset, as for all datasets")
    return parts[0].path


def _part(value: Any, name: str) -> DatasetPart:
    if isinstance(value, DatasetPart):
        return value
    if isinstance(value, str):
        shared = _shared(value)
        value = {"path": value} if shared is None else {"path": shared["path"], "share": shared["share"]}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a path, or a mapping with a path")
    try:
        return DatasetPart(**{str(key).replace("-", "_"): inner for key, inner in value.items()})
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False))
        raise ValueError(f"{name}: {'; '.join(faults)}") from error


def _shared(text: str) -> re.Match[str] | None:
    """A path with a share; a path that exists is one, whatever it contains."""
    match = _WITH_SHARE.fullmatch(text)
    return None if match is None or Path(text).expanduser().exists() else match


_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"anyOf": [{"type": "string"}, DatasetPart.model_json_schema()]}},
    ]
}
# A path or hub id, or the datasets of a mixture.
DatasetValue = Annotated[PathText | tuple[DatasetPart, ...], BeforeValidator(_read), WithJsonSchema(_SCHEMA)]


def parts_of(value: str | Sequence[DatasetPart]) -> tuple[DatasetPart, ...]:
    """The datasets of a value."""
    return (DatasetPart(path=value),) if isinstance(value, str) else tuple(value)


def words_of(value: str | Sequence[DatasetPart]) -> list[str]:
    """A value as words of a command line: paths, with their shares if there are any."""
    return [part.path if part.share is None else f"{part.path}={part.share:g}" for part in parts_of(value)]


def text_of(value: str | Sequence[DatasetPart]) -> str:
    """A value as the user calls it."""
    return " + ".join(words_of(value))
