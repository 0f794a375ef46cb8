"""The errors that users meet, each with its exit code. Knows no terminal: the CLI prints them as one line."""

from __future__ import annotations


class UserError:
    """Base of all errors for users: what is wrong, where, and what to do.

    Args:
        what: what is wrong.
        where: `FILE:LINE`, an option or a path, at the start of the line.
        fix: what to do about it, at the end of the line.
        details: lines to print before the error, such as invalid rows.
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
    """An error that the user can fix."""


class DataError(TisdpoError):
    """An error in a dataset or in token weights: exit 1."""


class ModelError(TisdpoError):
    """An error in a model directory, its weights or its tokenizer: exit 1."""


class TrainingError(TisdpoError):
    """An error at run time, such as a non-finite loss: exit 1."""


class RankError(TrainingError):
    """An error on one of several processes, which must report it itself."""


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
