"""The groups of settings that watch a training."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, field_validator

from tisdpo_cli.settings.fields import Group, PathText, setting

TRACKER_NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


def _joined(value: Any) -> Any:
    """In a file trackers may be a list, and nothing is none."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value) or "none"
    return "none" if value is None else value


class Tracking(Group):
    """Trackers of experiments, none unless asked for."""

    report_to: Annotated[str, BeforeValidator(_joined)] = setting(
        "none",
        f"send the metrics to trackers: {', '.join(TRACKER_NAMES)}; several with commas",
        "Tracking",
        shapes_result=False,
        metavar="NAMES",
    )
    run_name: PathText | None = setting(
        None, "name of the run in trackers (default: that of the output directory)", "Tracking", shapes_result=False,
        repeated=False, metavar="NAME",
    )  # fmt: skip
    tracker_project: PathText = setting(
        "tisdpo", "project or experiment in trackers", "Tracking", "--project", shapes_result=False, metavar="NAME"
    )

    def names(self) -> tuple[str, ...]:
        """The trackers, each once."""
        return tuple(dict.fromkeys(name for name in self.report_to.replace(",", " ").split() if name != "none"))

    @field_validator("report_to")
    @classmethod
    def _knows_the_trackers(cls, value: str) -> str:
        for name in value.replace(",", " ").split():
            if name not in (*TRACKER_NAMES, "none"):
                raise ValueError(f"unknown tracker {name!r}; use {', '.join(TRACKER_NAMES)} or none")
        return value
