"""A process that `--num-processes` started: it leaves its error to the launching process, which reports one for all.

Imports nothing heavy: it is loaded before everything else.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tisdpo_cli.errors import Interrupted, PeerEnded, TisdpoError

# The directory for errors; set in workers only. Variables that begin with TISDPO_ are settings.
_VARIABLE = "LAUNCHED_BY_TISDPO"


def worker_environment(folder: Path) -> dict[str, str]:
    """What marks a process as a worker that leaves its error in a directory."""
    return {_VARIABLE: str(folder)}


def is_worker() -> bool:
    """Whether this process was started by `--num-processes`."""
    return _VARIABLE in os.environ


def end_with_launcher() -> None:
    """In a worker, stop as after SIGTERM when the launching process is gone: its end of stdin is closed then."""
    if is_worker():
        _thread.start_new_thread(_wait_for_end_of_stdin, ())


def _wait_for_end_of_stdin() -> None:
    with suppress(OSError):
        while os.read(0, 1):
            pass
        if os.name == "posix":
            os.kill(os.getpid(), signal.SIGTERM)
        else:  # where that ends a process without a word
            signal.raise_signal(signal.SIGTERM)


@dataclass(frozen=True)
class WorkerError:
    """The error of a worker.

    Attributes:
        error: to report.
        only_follows: whether it only follows the end of another process, or a signal.
    """

    error: TisdpoError | Interrupted
    only_follows: bool


def leave_error(error: TisdpoError | Interrupted) -> None:
    """Leave the error of this worker for the launching process."""
    fields = {
        "what": error.what,
        "where": error.where,
        "fix": error.fix,
        "details": error.details,
        "exit_code": error.exit_code,
        "interrupted": isinstance(error, Interrupted),
        "only_follows": isinstance(error, (Interrupted, PeerEnded)),
    }
    path = _file(Path(os.environ[_VARIABLE]), int(os.environ["RANK"]))
    with suppress(OSError):
        path.write_text(json.dumps(fields), encoding="utf-8", newline="\n")


def read_error(folder: Path, rank: int) -> WorkerError | None:
    """The error that a worker left, if any."""
    try:
        fields = json.loads(_file(folder, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return WorkerError(_error(fields), fields["only_follows"])


def _error(fields: Mapping[str, Any]) -> TisdpoError | Interrupted:
    if fields["interrupted"]:
        return Interrupted(fields["exit_code"] - 128, fields["what"], fix=fields["fix"])
    where, fix, details = fields["where"], fields["fix"], tuple(fields["details"])
    error = TisdpoError(fields["what"], where=where, fix=fix, details=details)
    error.exit_code = fields["exit_code"]
    return error


def _file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"
