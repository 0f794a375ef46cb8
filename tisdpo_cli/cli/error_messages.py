"""One table from exceptions to an error message and an exit code, and how the error is printed."""

from __future__ import annotations

import signal
import sys
import traceback

import typer

from tisdpo_cli.cli.process import command_line, is_first_rank
from tisdpo_cli.errors import (
    Interrupted,
    OutOfMemory,
    PeerEnded,
    RankError,
    TisdpoError,
    UsageError,
    is_out_of_memory,
    is_peer_ended,
)
from tisdpo_cli.runs.worker import is_worker, leave_error
from tisdpo_cli.text import visible

_NOT_DETERMINISTIC = " does not have a deterministic implementation"


def explain(fault: BaseException) -> TisdpoError | Interrupted:
    """The error to report for an exception."""
    if isinstance(fault, (TisdpoError, Interrupted)):
        return fault
    if isinstance(fault, (KeyboardInterrupt, typer.Abort)):
        return Interrupted(signal.SIGINT, "interrupted", fix="rerun the same command")
    if isinstance(fault, typer.TyperException):
        return UsageError(fault.format_message().rstrip("."), fix="see --help")
    if is_out_of_memory(fault):
        return OutOfMemory(fix="free memory")
    if isinstance(fault, OSError):
        where = str(fault.filename) if fault.filename else ""
        return TisdpoError(fault.strerror or str(fault), where=where, fix="--debug shows where")
    return _unexpected(fault)


def _unexpected(fault: BaseException) -> TisdpoError:
    if is_peer_ended(fault):
        return PeerEnded()
    operation, words, _ = str(fault).partition(_NOT_DETERMINISTIC)
    if words:
        return TisdpoError(
            f"{operation.strip()} has no deterministic kernel on this device; trainings give the same bytes every time",
            fix="use another device or model",
        )
    first = (str(fault).strip().splitlines() or [""])[0]
    return TisdpoError(f"{type(fault).__name__}: {first}", fix="this is a bug in tisdpo; --debug shows where")


def report_error(fault: BaseException, debug: bool) -> int:
    """Print an error as one line, the last one on stderr; a worker leaves it to the process that launched it.

    Args:
        fault: what ended the command.
        debug: whether its traceback is printed before.

    Returns:
        The exit code.
    """
    if debug:
        print(visible("".join(traceback.format_exception(fault)), keep_lines=True), file=sys.stderr)
    # Without an error there is no need for it.
    from tisdpo_cli.cli.console import print_error

    error = explain(fault)
    if is_worker():
        leave_error(error)
        return error.exit_code
    # The other ranks meet the same error in the same data; an error of their own they must report themselves.
    if is_first_rank() or (not error.shared and (type(error) is TisdpoError or isinstance(error, RankError))):
        for line in error.details:
            print(visible(line), file=sys.stderr)
        if isinstance(error, Interrupted):
            print(f"resume with: {visible(command_line())}", file=sys.stderr)
        print_error(error)
    return error.exit_code
