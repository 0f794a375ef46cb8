"""The program `tisdpo`: its commands, made from the registry. `start` is where it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import typer

from tisdpo_cli import __version__
from tisdpo_cli.cli.arguments import read_arguments
from tisdpo_cli.cli.error_messages import report_error
from tisdpo_cli.cli.help import CommandWithHelp, GroupWithHelp
from tisdpo_cli.cli.options import Invocation, command_function
from tisdpo_cli.cli.signals import SignalHandlers
from tisdpo_cli.cli.start import main
from tisdpo_cli.cli.streams import write_result
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.settings.commands import COMMANDS, CommandSpec

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="tisdpo",
    cls=GroupWithHelp,
    help="Token-level Importance Sampling for Direct Preference Optimization (TIS-DPO): train two contrastive "
    "models, score every token with them, and train with the scores as token weights.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        write_result(f"tisdpo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Optional[bool] = typer.Option(  # noqa: UP045
        None, "--version", help="show the version and exit", callback=_version, is_eager=True
    ),
) -> None:
    """Nothing happens without a command."""


def _execute(spec: CommandSpec, typed: Invocation) -> None:
    # Help needs none of it.
    from tisdpo_cli.cli.execute import execute

    execute(spec, typed)


for _name, _spec in COMMANDS.items():
    app.command(_name, cls=CommandWithHelp, rich_help_panel=_spec.panel)(command_function(_spec, _execute))


def run(typed: Sequence[str], signals: SignalHandlers) -> int:
    """Run a command line and report its error, if any.

    Args:
        typed: the arguments of the program.
        signals: in force while it runs.

    Returns:
        The exit code.
    """
    arguments = read_arguments(typed, COMMANDS)
    try:
        code = app(args=arguments.words or ["--help"], prog_name="tisdpo", standalone_mode=False, obj=arguments)
        if not signals.received:
            return (code if isinstance(code, int) else 0) if arguments.words else 2
        # A library swallowed the interruption.
        fault: BaseException = signals.error()
    except SystemExit:
        raise
    except BaseException as caught:
        # A library may turn an interruption into an error of its own.
        fault = signals.error() if signals.received and not isinstance(caught, Interrupted) else caught
    return report_error(fault, "--debug" in arguments.words)
