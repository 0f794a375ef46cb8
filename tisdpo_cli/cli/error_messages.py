"""One table from exceptions to an error message and an exit code."""

from __future__ import annotations

import signal

import typer

from tisdpo_cli.errors import Interrupted, TisdpoError, UsageError
from tisdpo_cli.settings.names import foreign_option_hint

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def explain(fault: BaseException) -> TisdpoError | Interrupted:
    """The error to report for an exception."""
    if isinstance(fault, (TisdpoError, Interrupted)):
        return fault
    if isinstance(fault, (KeyboardInterrupt, typer.Abort)):
        return Interrupted(signal.SIGINT, "interrupted", fix="rerun the same command")
    if isinstance(fault, typer.TyperException):
        option = getattr(fault, "option_name", None)
        hint = foreign_option_hint(option) if option else None
        if hint is not None:
            return UsageError(f"No such option: {option}", fix=hint)
        return UsageError(fault.format_message().rstrip("."), fix="see --help")
    if isinstance(fault, MemoryError) or any(words in str(fault).lower() for words in _OUT_OF_MEMORY):
        return TisdpoError(
            "out of memory",
            fix="lower --micro-batch-size (estimate: --batch-size) or --max-length, or use --gradient-checkpointing "
            "(estimate: --sequential)",
        )
    if isinstance(fault, OSError):
        where = str(fault.filename) if fault.filename else ""
        return TisdpoError(fault.strerror or str(fault), where=where, fix="--debug shows where")
    first = (str(fault).strip().splitlines() or [""])[0]
    return TisdpoError(f"{type(fault).__name__}: {first}", fix="this is a bug in tisdpo; --debug shows where")
