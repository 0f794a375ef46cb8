"""Settings of `env`."""

from __future__ import annotations

from typing import ClassVar

from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.fields import setting


class Env(Command):
    """Show versions, machine, cache and TISDPO_* variables, for bug reports."""

    command: ClassVar[str] = "env"

    clear_cache: bool = setting(
        False,
        "remove all cached reference log-probs and tokenized datasets",
        "Run",
        shapes_result=False,
        repeated=False,
    )
