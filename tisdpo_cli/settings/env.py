"""Settings of `env`: none."""

from __future__ import annotations

from typing import ClassVar

from tisdpo_cli.settings.base import Command


class Env(Command):
    """Show versions, machine, cache and TISDPO_* variables, for bug reports."""

    command: ClassVar[str] = "env"
