"""Settings of `merge`."""

from __future__ import annotations

from typing import ClassVar, Literal

from tisdpo_cli.settings.base import (
    Command,
    dry_run_setting,
    model_setting,
    output_setting,
    overwrite_setting,
    remote_code_setting,
)
from tisdpo_cli.settings.fields import PathText, setting
from tisdpo_cli.settings.groups import Hub


class Merge(Command):
    """Merge an adapter into its base model: a whole model with the same log-probs."""

    command: ClassVar[str] = "merge"

    model: PathText = model_setting("adapter to merge: directory or hub id", "-m", "--adapter")
    trust_remote_code: bool = remote_code_setting()
    dtype: Literal["float32", "bf16"] = setting("float32", "precision of the weights to write", "Output")
    dequantize: bool = setting(
        False, "merge an adapter of a base model in 4 bits into its weights as they are in 4 bits, expanded", "Output"
    )
    output_dir: PathText = output_setting()
    overwrite: bool = overwrite_setting()
    hub: Hub = Hub()
    dry_run: bool = dry_run_setting()
