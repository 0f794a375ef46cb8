"""Settings of `report`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.fields import PathText, setting

_SCHEMA = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string"}}]}


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Paths = Annotated[
    tuple[PathText, ...], Field(min_length=1), BeforeValidator(_as_list), WithJsonSchema(_SCHEMA)
]  # one path, or several


class Report(Command):
    """Draw the curves of trainings, finished or not, on one offline page, with the settings in which they differ."""

    command: ClassVar[str] = "report"

    runs: Paths = setting(
        ..., "output directories of trainings or of run; several are drawn over each other", "Data",
        shapes_result=False, metavar="DIR", many=True,
    )  # fmt: skip
    output: PathText = setting(..., "the page to write", "Output", "-o", shapes_result=False, metavar="FILE")
