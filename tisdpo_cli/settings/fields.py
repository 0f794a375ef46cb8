"""A setting: its type with its checks, its help, its flags, and what the program does with it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.fields import FieldInfo

# The groups of options in help, in the order a user thinks: what, how, how much, where to.
PANELS = (
    "Model",
    "Data",
    "Stages",
    "Method",
    "Steps before the transform",
    "Token weights",
    "Adapter",
    "Optimization",
    "Memory",
    "Evaluation",
    "Samples",
    "Rewards",
    "View",
    "Checks",
    "Output",
    "Sharing",
    "Tracking",
    "Run",
)


def _not_a_boolean(value: Any) -> Any:
    # Python counts True as 1; a batch size of `true` is a typo.
    if isinstance(value, bool):
        raise ValueError("must be a number, not a boolean")
    return value


_Number = BeforeValidator(_not_a_boolean)
PositiveInt = Annotated[int, Field(gt=0), _Number]
NonNegativeInt = Annotated[int, Field(ge=0), _Number]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), _Number]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), _Number]
Seed = Annotated[int, Field(ge=0, lt=2**63), _Number]
PathText = Annotated[str, Field(min_length=1)]
# In a file also a mapping.
JsonObject = Annotated[
    str,
    Field(min_length=1),
    BeforeValidator(lambda given: json.dumps(given) if isinstance(given, dict) else given),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}),
]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False), _Number]


def setting(
    default: Any,
    help_text: str,
    panel: str,
    *flags: str,
    shapes_result: bool = True,
    repeated: bool = True,
    reads: Literal["model", "dataset"] | None = None,
    metavar: str | None = None,
    many: bool = False,
) -> Any:
    """A field with its help.

    Args:
        default: the default value; `...` makes the setting required.
        help_text: one line for `--help`, without the default.
        panel: one of `PANELS`.
        flags: further spellings beside `--the-field-name`.
        shapes_result: whether another value may give another output; only these settings are compared when an output
            directory is used again.
        repeated: whether the suggested next command repeats the setting.
        reads: what the path names, so that it can be checked before anything heavy is imported.
        metavar: the placeholder for the value in help.
        many: whether the option may be given several times.
    """
    extra: dict[str, Any] = {
        "panel": panel,
        "flags": list(flags),
        "shapes_result": shapes_result,
        "repeated": repeated,
        "reads": reads,
        "metavar": metavar,
        "many": many,
    }
    return Field(default, description=help_text, json_schema_extra=extra)


def meta(info: FieldInfo) -> dict[str, Any]:
    """What `setting` attached to a field; empty for a group of settings."""
    extra = info.json_schema_extra
    return dict(extra) if isinstance(extra, dict) else {}


def shapes_result(info: FieldInfo) -> bool:
    """Whether another value of a setting may give another output."""
    return bool(meta(info).get("shapes_result", True))


class Group(BaseModel):
    """A nested group of settings. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, coerce_numbers_to_str=True)

    def in_force(self) -> dict[str, Any]:
        """The settings of the group that shape the result, by name, the same for every way to give them.

        A group whose settings may be left out in favor of a default elsewhere resolves them here.
        """
        return {name: getattr(self, name) for name, info in type(self).model_fields.items() if shapes_result(info)}


def group_of(info: FieldInfo) -> type[Group] | None:
    """The group model of a field, or None for a single setting."""
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Group) else None
