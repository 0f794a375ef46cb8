"""What a setting is made of: its type with its checks, its help panel, its flags, and whether it shapes the result."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo


def _not_a_boolean(value: Any) -> Any:
    # Python counts True as 1; a batch size of `true` is a typo.
    if isinstance(value, bool):
        raise ValueError("a number is needed, not a boolean")
    return value


_Number = BeforeValidator(_not_a_boolean)
PositiveInt = Annotated[int, _Number, Field(gt=0)]
NonNegativeInt = Annotated[int, _Number, Field(ge=0)]
PositiveFloat = Annotated[float, _Number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, _Number, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, _Number, Field(ge=0, lt=2**63)]
PathText = Annotated[str, Field(min_length=1)]
FiniteFloat = Annotated[float, _Number, Field(allow_inf_nan=False)]


def setting(
    default: Any,
    help_text: str,
    panel: str,
    *flags: str,
    shapes_result: bool = True,
    metavar: str | None = None,
) -> Any:
    """A field with its help.

    Args:
        default: the value where nobody says anything; `...` makes it required.
        help_text: one line for `--help`.
        panel: the group of options it is shown under.
        flags: further spellings beside `--the-field-name`.
        shapes_result: whether another value may give another output; only those are compared when an output
            directory is used again.
        metavar: what stands for the value in the help.
    """
    extra: dict[str, Any] = {"panel": panel, "flags": list(flags), "shapes_result": shapes_result, "metavar": metavar}
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
        """What of the group shapes the result, by name, such that the same computation is always told the same.

        A group in which a setting may be left out, and its default given, resolves it here.
        """
        return {name: getattr(self, name) for name, info in type(self).model_fields.items() if shapes_result(info)}


def group_of(info: FieldInfo) -> type[Group] | None:
    """The group model of a field, or None for a single setting."""
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Group) else None
