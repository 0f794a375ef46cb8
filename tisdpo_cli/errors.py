"""The errors that users meet, each with its exit code. Knows no terminal: the CLI prints them as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class UserError:
    """Base of all errors for users: what is wrong, where, and what to do.

    Args:
        what: what is wrong.
        where: `FILE:LINE`, an option or a path, at the start of the line.
        fix: what to do about it, at the end of the line.
        details: lines to print before the error, such as invalid rows.

    Attributes:
        shared: whether every process of the run raises this error, so that the first one alone reports it.
    """

    exit_code = 1
    shared = False

    def __init__(self, what: str, *, where: str = "", fix: str = "", details: tuple[str, ...] = ()) -> None:
        super().__init__(what)  # type: ignore[call-arg]
        self.what = what
        self.where = where
        self.fix = fix
        self.details = details

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}; {self.fix}" if self.fix else line


class TisdpoError(UserError, Exception):
    """An error that the user can fix."""


class DataError(TisdpoError):
    """An error in a dataset or in token weights: exit 1."""


class ModelError(TisdpoError):
    """An error in a model directory, its weights or its tokenizer: exit 1."""


class TrainingError(TisdpoError):
    """An error at run time, such as a non-finite loss: exit 1."""


class RankError(TrainingError):
    """An error on one of several processes, which must report it itself."""


class PeerEnded(TrainingError):
    """Another process of the run has ended, which this one noticed while it waited for it: exit 1."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has ended or does not answer; its own message, if any, is above",
            fix="rerun the same command to resume",
        )
        self.args = ()


# Classes of torch.distributed; gloo raises a plain RuntimeError that names its source file.
_OF_PROCESS_GROUPS = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_PEER_IS_GONE = (
    "connection closed by",
    "connection reset by peer",
    "connection was likely closed",
    "broken pipe",
    "failed to recv, got 0 bytes",
    "pair closure",
    "remote process exited",
    "communicator was aborted",
    "collective operation timeout",
    "timed out waiting",
    "waiting for clients",
    "wait timeout after",
)


def is_peer_ended(error: BaseException) -> bool:
    """Whether an error of torch's process groups (gloo, NCCL, the store) means that another process is gone."""
    if isinstance(error, UserError):
        return isinstance(error, PeerEnded)
    words = str(error).lower()
    of_process_groups = bool(_OF_PROCESS_GROUPS & {kind.__name__ for kind in type(error).__mro__})
    of_gloo = type(error) is RuntimeError and ("gloo" in words or "nccl" in words)
    return (of_process_groups or of_gloo) and any(part in words for part in _PEER_IS_GONE)


# What a command does when memory runs out, as far as the advice differs.
Activity = Literal["", "reading", "loading", "reference", "evaluating", "generating"]
_ACTIVITIES: dict[Activity, str] = {
    "": "",
    "reading": " while reading the dataset",
    "loading": ": the model does not fit",
    "reference": " while computing reference log-probs",
    "evaluating": " while evaluating",
    "generating": " while generating",
}
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "cublas_status_alloc_failed",
    "bad_alloc",
)


class OutOfMemory(RankError):
    """Memory ran out: exit 1. Which settings lower it only the settings of the command know.

    Args:
        activity: what the command did.
        where: the model or file at fault.
        fix: what lowers memory.
    """

    def __init__(self, activity: Activity = "", *, where: str = "", fix: str = "") -> None:
        super().__init__(f"out of memory{_ACTIVITIES[activity]}", where=where, fix=fix)
        # The argument to recreate it with when it is unpickled in another process.
        self.args = (activity,)
        self.activity = activity


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, which says nothing about a file or a model."""
    if isinstance(error, UserError):
        return isinstance(error, OutOfMemory)
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(part in words for part in _OUT_OF_MEMORY)


@contextmanager
def naming_out_of_memory(activity: Activity, where: str = "") -> Iterator[None]:
    """Turn the many errors for memory that ran out into one that says in what.

    Raises:
        OutOfMemory: the block ran out of memory; of nested blocks the innermost names it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(activity, where=where) from error


class UsageError(TisdpoError):
    """An error in the options or settings of a command: exit 2."""

    exit_code = 2


class Interrupted(UserError, BaseException):
    """Stopped by a signal, after a checkpoint if there was something to save: exit 130 or 143.

    Like KeyboardInterrupt it is not an `Exception`, so that code that catches the errors of a library lets it pass.
    """

    def __init__(self, signal_number: int, what: str, *, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        # The arguments to recreate it with when it is unpickled in another process.
        self.args = (signal_number, what)
        self.exit_code = 128 + signal_number
