"""This process: how it starts, how signals and errors end it, and with which exit code."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from tisdpo_cli.cli.console import print_error
from tisdpo_cli.cli.error_messages import explain
from tisdpo_cli.cli.streams import is_first_rank
from tisdpo_cli.errors import Interrupted, RankError, TisdpoError
from tisdpo_cli.text import visible


def command_line() -> str:
    """The command line of this process, ready to paste."""
    return shlex.join(["tisdpo", *sys.argv[1:]])


def configure_openmp() -> None:
    """Let idle threads of a matrix product spin for microseconds, not milliseconds, before they sleep.

    Must be called before torch is loaded. On free cores it changes nothing; on cores that other programs use, small
    models train several times faster, because a spinning thread no longer blocks the one it waits for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def handle_sigterm() -> None:
    """Turn SIGTERM into an error with exit code 143."""
    signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, _frame: Any) -> None:
    raise Interrupted(number, "interrupted", fix="rerun the same command")


def exit_with_error(fault: BaseException, arguments: Sequence[str]) -> NoReturn:
    """Print an error in one line and exit with its code."""
    if "--debug" in arguments:
        print(visible("".join(traceback.format_exception(fault)), keep_lines=True), file=sys.stderr)
    error = explain(fault)
    # The other ranks meet the same error in the same data; an error of their own they must report themselves.
    if is_first_rank() or type(error) is TisdpoError or isinstance(error, RankError):
        for line in error.details:
            print(visible(line), file=sys.stderr)
        if isinstance(error, Interrupted):
            print(f"resume with: {command_line()}", file=sys.stderr)
        print_error(error)
    leave(error.exit_code)


def leave(code: int) -> NoReturn:
    """Exit; in a process group at once, without shutting the interpreter down.

    After an error the others may wait for this process in a collective call, and its end ends them too. After a success
    the threads of the group, which `destroy_process_group` does not always end, still release tensors: Python 3.11
    ends a thread that asks for the interpreter while it shuts down, and that aborts the process.
    """
    # A launcher makes a group for one process too.
    if "LOCAL_RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        sys.exit(code)
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        code = code or 1
    finally:
        os._exit(code)
