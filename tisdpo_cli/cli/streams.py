"""The standard streams: stdout gets the result and nothing else, stderr may go away. Imports nothing heavy."""

from __future__ import annotations

import codecs
import os
import sys
from pathlib import Path
from typing import Any

from tisdpo_cli.cli.process import is_first_rank
from tisdpo_cli.errors import TisdpoError
from tisdpo_cli.reporter import Reporter, Silent
from tisdpo_cli.text import visible

_ESCAPE = "tisdpo-escape"


def prepare_streams() -> None:
    """Let neither a closed stderr nor a narrow encoding of stdout lose work or results."""
    # A file that is opened later must not become stdout or stderr, which libraries write to.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if not isinstance(sys.stderr, _Expendable):
        sys.stderr = _Expendable(sys.stderr)
    codecs.register_error(_ESCAPE, _escape)
    # Only the strict handlers: others are a choice of the user.
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape") and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors=_ESCAPE)
    for name in ("COLUMNS", "LINES"):
        if os.environ.get(name, "").strip("0") == "":
            os.environ.pop(name, None)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write bytes of paths as they are, and other characters that cannot be encoded as `\\xe9`."""
    if isinstance(error, UnicodeEncodeError) and all("\udc80" <= ch <= "\udcff" for ch in _part(error)):
        return codecs.lookup_error("surrogateescape")(error)
    return codecs.lookup_error("backslashreplace")(error)


def _part(error: UnicodeEncodeError) -> str:
    return error.object[error.start : error.end]


class _Expendable:
    """A text stream whose failure is no reason to stop: once its reader is gone, it swallows everything."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream if stream is not None else _nowhere()

    def write(self, text: str) -> int:
        """Write text, if that is possible."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        self._attempt("flush")

    def _attempt(self, method: str, *arguments: str) -> None:
        try:
            getattr(self._stream, method)(*arguments)
        except BlockingIOError:
            return  # a slow reader is still one
        except (OSError, ValueError):
            self._stream = _nowhere()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8", newline="\n")  # noqa: PTH123


def make_reporter() -> Reporter:
    """A reporter on stderr; a silent one in all processes but the first."""
    if not is_first_rank():
        return Silent()
    from tisdpo_cli.cli.console import TerminalReporter

    return TerminalReporter()


def write_path(path: Path) -> None:
    """Write the path of an output to stdout: as it is for programs, without control characters to a terminal."""
    text = str(path)
    write_result(visible(text) if sys.stdout is not None and sys.stdout.isatty() else text)


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
        sys.stdout = _nowhere()
        raise TisdpoError("cannot write to stdout", fix="the output is complete, rerun to print its path") from fault
