"""The faults a user can meet, each with its exit code. It knows no terminal: the CLI turns them into a line."""

from __future__ import annotations


class UserError:
    """What is told in one line: what is wrong, where, and what to do.

    Args:
        what: what is wrong.
        where: `FILE:LINE`, an option or a path; comes first in the line.
        fix: what to do about it; comes last.
        details: lines that are printed before the error, one each (bad rows, say).
    """

    exit_code = 1

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
    """A fault the user can do something about."""


class DataError(TisdpoError):
    """A fault in a dataset or in token weights: exit 1."""


class ModelError(TisdpoError):
    """A fault in a model directory, its weights or its tokenizer: exit 1."""


class TrainingError(TisdpoError):
    """A fault at run time, a non-finite loss for example: exit 1."""


class RankError(TrainingError):
    """A fault that only one of several processes meets, so that this one must tell it."""


class UsageError(TisdpoError):
    """The command cannot work as typed: exit 2."""

    exit_code = 2


class Interrupted(UserError, BaseException):
    """Stopped by a signal, after a checkpoint where there was something to keep: exit 130 or 143.

    Like KeyboardInterrupt it is no `Exception`: whoever catches the faults of a library must not catch a signal.
    """

    def __init__(self, signal_number: int, what: str, *, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        # What it is made from again on its way out of another process.
        self.args = (signal_number, what)
        self.exit_code = 128 + signal_number
