"""What all commands share: the sources of their values, and the settings that most of them have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from tisdpo_cli.formats import FORMAT_NAMES
from tisdpo_cli.settings.fields import Group, group_of, meta, setting, shapes_result

PREFERENCE_PAIRS = f"preference pairs: {FORMAT_NAMES} file, directory, or hub id"


class Command(BaseModel):
    """Settings of a command. Values come from layers (see `sources`), highest priority first.

    Attributes:
        command: the name of the command, in the terminal and in its outputs.
    """

    command: ClassVar[str]

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, coerce_numbers_to_str=True, hide_input_in_errors=True
    )

    def __init__(self, value_layers: Sequence[Mapping[str, Any]] = (), **values: Any) -> None:
        """From layers of values, groups as mappings, the highest priority first, after plain keyword arguments."""
        merged: dict[str, Any] = {}
        for layer in (*reversed(value_layers), values):
            for name, value in layer.items():
                before = merged.get(name)
                if isinstance(before, Mapping) and isinstance(value, Mapping):
                    merged[name] = {**before, **value}
                else:
                    merged[name] = value
        super().__init__(**merged)

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
        """The settings that shape the result, by dotted name, with the values in force."""
        values: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if meta(info).get("many") and not isinstance(value, str):
                # The parts of a mixture are compared by content too, but not what is done with them.
                values[name] = [part.in_force() for part in value]
            elif isinstance(value, Group):
                values.update({f"{name}.{inner}": in_force for inner, in_force in value.in_force().items()})
            elif shapes_result(info):
                values[name] = value
        return values

    def with_values(self, values: Mapping[str, Any]) -> Command:
        """A copy with other values for some settings, by dotted name; values are not validated."""
        updates: dict[str, Any] = {}
        for path, value in values.items():
            first, dot, name = path.partition(".")
            group = updates.get(first, getattr(self, first))
            updates[first] = group.model_copy(update={name: value}) if dot else value
        return self.model_copy(update=updates)


def leaf_paths(command: type[Command]) -> dict[str, FieldInfo]:
    """Every single setting of a command by dotted name (`optim.batch_size`); stages of `run` are left out."""
    paths: dict[str, FieldInfo] = {}
    for name, info in command.model_fields.items():
        group = group_of(info)
        if group is not None:
            paths.update({f"{name}.{inner}": field for inner, field in group.model_fields.items()})
        elif info.json_schema_extra is not None:
            paths[name] = info
    return paths


# Settings that several commands share -------------------------------------------------------------------------


def model_setting(help_text: str, *flags: str, default: Any = ..., panel: str = "Model", repeated: bool = False) -> Any:
    """The path or hub id of a model. It is compared by content, not by name."""
    return setting(
        default, help_text, panel, *flags, shapes_result=False, repeated=repeated, reads="model", metavar="PATH"
    )


def dataset_setting(help_text: str, *flags: str, many: bool = False) -> Any:
    """The path or hub id of a dataset, or `many` of them. It is compared by content, not by name."""
    return setting(
        ..., help_text, "Data", *flags, shapes_result=False, repeated=False, reads="dataset", metavar="PATH", many=many
    )


def pairs_setting(help_text: str = PREFERENCE_PAIRS) -> Any:
    """`--dataset` of the commands that take a mixture."""
    return dataset_setting(f"{help_text}; repeat it as PATH=SHARE for a mixture", "-d", "--dataset-name", many=True)


def output_setting() -> Any:
    """`--output-dir`, the same for every command that creates an output."""
    return setting(..., "output directory", "Output", "-o", shapes_result=False, repeated=False, metavar="DIR")


def overwrite_setting(help_text: str = "overwrite an output directory created with different settings") -> Any:
    """`--overwrite`."""
    return setting(False, help_text, "Output", shapes_result=False, repeated=False)


def file_setting(help_text: str, panel: str, metavar: str = "FILE") -> Any:
    """A file or directory that a command writes beside its result."""
    return setting(None, help_text, panel, shapes_result=False, repeated=False, metavar=metavar)


def seed_setting(help_text: str = "random seed") -> Any:
    """`--seed`."""
    return setting(0, help_text, "Run")


def remote_code_setting() -> Any:
    """`--trust-remote-code`."""
    return setting(False, "allow running custom code from the model repository", "Model")


def dry_run_setting() -> Any:
    """`--dry-run`, the same for every command that computes."""
    return setting(
        False, "check everything, predict memory, disk and time, and show the first row; writes nothing", "Run",
        shapes_result=False, repeated=False,
    )  # fmt: skip


def profile_setting() -> Any:
    """`--profile`, the same for every training."""
    return file_setting("write a profile of some steps: a trace and a table of times", "Run", "DIR")


def resume_setting(paths: bool) -> Any:
    """`--resume`; `paths` where a checkpoint may be named."""
    if not paths:
        return setting("auto", "resume an interrupted run", "Output", shapes_result=False, repeated=False)
    return setting(
        "auto", "resume from a checkpoint: auto (latest), never, or a path", "Output",
        shapes_result=False, repeated=False, metavar="auto|never|PATH",
    )  # fmt: skip


def num_processes_setting() -> Any:
    """`--num-processes`, the same for every command that computes."""
    return setting(
        1, "start this many processes on this machine, one per GPU, or sharing the CPU", "Run", shapes_result=False
    )


Resume = Literal["auto", "never"]
