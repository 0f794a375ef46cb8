"""Settings of `translate`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.fields import PathText, setting

Dialect = Literal["trl", "llama-factory", "axolotl"]


class Translate(Command):
    """Print the tisdpo command line for a command or config of TRL, LLaMA-Factory or axolotl.

    Give the command after --, with its launcher if it has one, or a config file with --from-trl.
    """

    command: ClassVar[str] = "translate"

    words: list[str] | None = setting(
        None, "command line of the other trainer, after --", "Data", repeated=False, many=True
    )
    from_trl: PathText | None = setting(
        None, "config file of TRL, LLaMA-Factory or axolotl", "Data", repeated=False, metavar="FILE"
    )
    dialect: Literal["auto", "trl", "llama-factory", "axolotl"] = setting(
        "auto", "whose options these are (auto: from the command or the names)", "Data"
    )
    yaml: bool = setting(False, "print a config file instead of a command line", "Output")

    @model_validator(mode="after")
    def _one_source(self) -> Translate:
        if bool(self.words) == (self.from_trl is not None):
            raise ValueError("give either a command line after --, or --from-trl FILE")
        return self
