"""What all commands have in common: where their values come from, and the settings that most of them share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tisdpo_cli.settings.fields import Group, setting, shapes_result

MODEL, RUNTIME = "Model", "Runtime"


class Command(BaseSettings):
    """Settings of a command. Values come from layers (see `sources`); the first layer that has a value wins.

    Attributes:
        command: the name of the command, in the terminal and in its outputs.
    """

    command: ClassVar[str]

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, validate_default=True, coerce_numbers_to_str=True, hide_input_in_errors=True
    )

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, settings_cls: type[BaseSettings], init_settings: Any, **_others: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take `value_layers=[{...}, ...]` as the sources, highest priority first; plain keywords go before them."""
        layers = init_settings.init_kwargs.pop("value_layers", ())
        return (init_settings, *(_Layer(settings_cls, layer) for layer in layers))

    def leaves(self) -> Iterator[tuple[str, FieldInfo, Any]]:
        """(dotted name, field, value) of every single setting."""
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Group):
                for inner, inner_info in type(value).model_fields.items():
                    yield f"{name}.{inner}", inner_info, getattr(value, inner)
            else:
                yield name, info, value

    def fingerprint(self) -> dict[str, Any]:
        """The settings that shape the result, by dotted name, as they are in force."""
        made: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Group):
                made.update({f"{name}.{inner}": set_to for inner, set_to in value.in_force().items()})
            elif shapes_result(info):
                made[name] = value
        return made

    def with_values(self, values: Mapping[str, Any]) -> Command:
        """A copy in which some settings, by dotted name, have other values; nothing is checked again."""
        updates: dict[str, Any] = {}
        for path, value in values.items():
            first, dot, name = path.partition(".")
            group = updates.get(first, getattr(self, first))
            updates[first] = group.model_copy(update={name: value}) if dot else value
        return self.model_copy(update=updates)


class _Layer(PydanticBaseSettingsSource):
    """One source of values, as a nested dict."""

    def __init__(self, settings_cls: type[BaseSettings], values: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def output_setting() -> Any:
    """`--output-dir`, the same for every command that makes something."""
    return setting(..., "directory to make", RUNTIME, "-o", shapes_result=False)


def path_input(help_text: str, panel: str, *flags: str, default: Any = ...) -> Any:
    """A path that is read. It is compared by the content that it holds, not by its name."""
    return setting(default, help_text, panel, *flags, shapes_result=False, metavar="PATH")


def seed_setting() -> Any:
    """`--seed`."""
    return setting(0, "seed of everything that is drawn", RUNTIME)


def overwrite_setting() -> Any:
    """`--overwrite`."""
    return setting(False, "remove an output that was made with other settings", RUNTIME, shapes_result=False)


def remote_code_setting() -> Any:
    """`--trust-remote-code`."""
    return setting(False, "run code that comes with the model", MODEL)


def dry_run_setting() -> Any:
    """`--dry-run`, the same for every training."""
    return setting(
        False, "check everything, show the plan and the first row, train nothing", RUNTIME, shapes_result=False
    )


def profile_setting() -> Any:
    """`--profile`, the same for every training."""
    return setting(
        None,
        "write a trace of some updates, and a table of where their time goes",
        RUNTIME,
        shapes_result=False,
        metavar="DIR",
    )
