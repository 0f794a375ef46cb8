"""What becomes of an option of another trainer, by its value. The tables are made of these rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a foreign option with a value stands for; one without values, notice and fault is off here too.

    Attributes:
        values: settings to set, by bare name, or by dotted name for commands with such a group alone.
        soft: settings to set unless the same source sets them.
        notice: what a user should know.
        fault: why it is refused, with what to use instead.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    soft: Mapping[str, Any] = field(default_factory=dict)
    notice: str = ""
    fault: str = ""


Rule = Callable[[Any], Outcome]

_WORDS = {"true": True, "yes": True, "false": False, "no": False, "none": None, "null": None, "~": None, "": None}
# Values that ask for nothing. A bare 0 is one: `eval_delay: 0`, `val_size: 0`.
_OFF: tuple[Any, ...] = (None, False, 0, [], {})


def plain(value: Any) -> Any:
    """A value in one form, whatever source it comes from: text of booleans, numbers, lists and mappings is parsed.

    A list of one value is this value.
    """
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        number = number_of(text)
        if number is not None:
            return number
        return _parsed(text) if text[0] in "{[" else text
    if isinstance(value, (list, tuple)):
        return plain(value[0]) if len(value) == 1 else [plain(item) for item in value]
    return value


def number_of(value: Any) -> int | float | None:
    """A number or the text of one as a number, else None."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else number


def _parsed(text: str) -> Any:
    # It takes its time to import.
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return plain(found) if isinstance(found, list) else found


def is_off(value: Any) -> bool:
    """Whether a plain value asks for nothing."""
    return any(value is off or (value == off and not isinstance(value, bool)) for off in _OFF)


def idle(why: str) -> Rule:
    """Without effect, whatever the value."""
    return lambda _value: Outcome(notice=why)


def refused(why: str, *accepted: Any) -> Rule:
    """Refused, unless the value asks for nothing, or for one of what happens anyway."""

    def rule(value: Any) -> Outcome:
        return Outcome() if is_off(value) or value in accepted else Outcome(fault=why)

    return rule


def always(why: str, *also: Any) -> Rule:
    """Always on here: without effect, but refused where it is switched off."""

    def rule(value: Any) -> Outcome:
        return Outcome(notice=why) if value is None or value is True or value in also else Outcome(fault=why)

    return rule


def taken(setting: str) -> Rule:
    """Another name of a setting, with the same values."""
    return lambda value: Outcome({setting: value})


def where_given(setting: str) -> Rule:
    """Another name of a setting, which nothing sets where the value is off."""
    return lambda value: Outcome() if is_off(value) else Outcome({setting: value})


def renamed(setting: str, note: str = "") -> Rule:
    """A setting of another form or name, which is said."""
    option = "--" + setting.replace("_", "-")
    return lambda value: Outcome() if value is None else Outcome({setting: value}, notice=note or f"taken as {option}")


def mapped(values: Mapping[Any, Outcome], otherwise: str) -> Rule:
    """By its value; refused where the value is none of these."""

    def rule(value: Any) -> Outcome:
        # A list cannot be a key.
        known = {str(key).lower(): outcome for key, outcome in values.items()}
        return known.get(str(value).lower(), Outcome(fault=otherwise))

    return rule
