"""This process: its command line, its rank, its threads, and how it ends. Imports nothing heavy."""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import sys
from contextlib import suppress
from typing import NoReturn


def command_line() -> str:
    """The command line of this process, ready to paste."""
    return shlex.join(["tisdpo", *sys.argv[1:]])


def is_first_rank() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def configure_openmp() -> None:
    """Let idle threads of a matrix product spin for microseconds, not milliseconds, before they sleep.

    Must be called before torch is loaded. On free cores it changes nothing; on cores that other programs use, small
    models train several times faster, because a spinning thread no longer blocks the one it waits for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def leave(code: int) -> NoReturn:
    """Exit; in a process group at once, without shutting the interpreter down.

    After an error the others may wait for this process in a collective call, and its end ends them too. After a success
    the threads of the group, which `destroy_process_group` does not always end, still release tensors: Python 3.11
    ends a thread that asks for the interpreter while it shuts down, and that aborts the process.
    """
    # A launcher makes a group for one process too.
    if "LOCAL_RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        # Registered last, it runs first.
        atexit.unregister(_ignore_signals)
        atexit.register(_ignore_signals)
        sys.exit(code)
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        code = code or 1
    finally:
        leave_no_files()
        os._exit(code)


def leave_no_files() -> None:
    """Remove temporary directories, where the interpreter is not shut down."""
    # Without this module there are none, and it takes its time to import.
    files = sys.modules.get("tisdpo_cli.files")
    with suppress(Exception):
        if files is not None:
            files.remove_temporary()


def _ignore_signals() -> None:
    """Keep the exit code if a signal comes while the interpreter shuts down.

    Python restores the system's handlers before the destructors of libraries run, and those can take a while.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        with suppress(AttributeError, ValueError):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
