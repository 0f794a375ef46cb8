"""The program `tisdpo`: its commands, made from the registry, and its entry point."""

from __future__ import annotations

import sys
from typing import NoReturn, Optional

import typer

from tisdpo_cli import __version__
from tisdpo_cli.cli.execute import execute
from tisdpo_cli.cli.help import CommandWithHelp, GroupWithHelp
from tisdpo_cli.cli.options import command_function, normalize_options
from tisdpo_cli.cli.process import configure_openmp, exit_with_error, handle_sigterm, leave
from tisdpo_cli.cli.streams import write_result
from tisdpo_cli.settings.commands import COMMANDS

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


for _name, _spec in COMMANDS.items():
    app.command(_name, cls=CommandWithHelp, rich_help_panel=_spec.panel)(command_function(_spec, execute))


def main() -> NoReturn:
    """Run the program and exit with 0, 1, 2, 130 or 143."""
    configure_openmp()
    arguments = normalize_options(sys.argv[1:], COMMANDS)
    if not arguments:
        app(args=["--help"], prog_name="tisdpo", standalone_mode=False)
        sys.exit(2)
    handle_sigterm()
    try:
        code = app(args=arguments, prog_name="tisdpo", standalone_mode=False)
    except BaseException as fault:
        if isinstance(fault, SystemExit):
            raise
        exit_with_error(fault, arguments)
    leave(code if isinstance(code, int) else 0)
