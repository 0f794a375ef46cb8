"""What goes to stdout, and who speaks: only the first process of a run."""

from __future__ import annotations

import os
import sys

from tisdpo_cli.cli.console import TerminalReporter
from tisdpo_cli.errors import TisdpoError
from tisdpo_cli.reporter import Reporter, Silent


def is_first_rank() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def make_reporter() -> Reporter:
    """A reporter on stderr; a silent one in all processes but the first."""
    return TerminalReporter() if is_first_rank() else Silent()


def write_result(text: str) -> None:
    """Write the result of a command to stdout.

    Raises:
        TisdpoError: stdout is closed or full; the output of the command is complete.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError) as fault:  # AttributeError: it was closed before the start
        # Python would try to flush once more at exit, and complain.
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        raise TisdpoError("cannot write to stdout", fix="the output is complete, rerun to print its path") from fault
