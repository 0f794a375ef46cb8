"""Signals outside a training loop, from before the first import to the end: one line and the way on, no traceback.

Imports nothing heavy, since it is loaded before everything else.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

from tisdpo_cli.cli.process import command_line, is_first_rank, leave_no_files
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.runs.worker import is_worker
from tisdpo_cli.text import visible

# SIGHUP does not exist on Windows.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_WHAT, _FIX = "interrupted", "rerun the same command"
_SHOW_CURSOR = "\x1b[?25h"
# What an interrupted command has to tidy up.
_GRACE_SECONDS = 5.0


class SignalHandlers:
    """Turn the first signal into `Interrupted`, and end the process at the second one.

    Libraries may swallow the exception: torch does so with all errors of its import of numpy. The command ends all the
    same, at the next `check_signals`, or after some seconds.

    Attributes:
        received: the first signal, 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._over = False
        self._outer: SignalHandlers | None = None
        self._before: dict[int, Any] = {}
        self._unraisable = sys.unraisablehook

    def __enter__(self) -> SignalHandlers:
        global _in_force
        self._outer, _in_force = _in_force, self
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before is signal.SIG_IGN and number not in (signal.SIGINT, signal.SIGTERM):
                continue  # started by nohup
            self._before[number] = before
            signal.signal(number, self._receive)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._stop_where_nothing_can_be_raised
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _in_force
        _in_force = self._outer
        self._over = True
        sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.received

    def error(self) -> Interrupted:
        """What to report after a signal."""
        return Interrupted(self.received, _WHAT, fix=_FIX)

    def report(self) -> None:
        """Write the error line and the way on straight to stderr: safe at any moment, also inside another write."""
        # The process that launched a worker reports for it.
        if not is_first_rank() or is_worker():
            return
        lines = f"resume with: {visible(command_line())}\nerror: {_WHAT}; {_FIX}\n"
        try:
            # A live progress display hides the cursor and leaves its line open.
            start = f"{_SHOW_CURSOR}\n" if os.isatty(2) else ""
            os.write(2, (start + lines).encode("utf-8", "backslashreplace"))
        except OSError:
            return

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            self._exit_now()
        self.received = number
        # Not `threading`: this may run while the main thread holds one of its locks.
        _thread.start_new_thread(self._end_after_grace, ())
        raise self.error()

    def _end_after_grace(self) -> None:
        time.sleep(_GRACE_SECONDS)
        if not self._over:
            self._exit_now()

    def _exit_now(self) -> NoReturn:
        self.report()
        leave_no_files()
        os._exit(self.exit_code)

    def _stop_where_nothing_can_be_raised(self, unraisable: Any) -> None:
        """A signal may arrive in a finalizer or a callback, whose errors Python prints and forgets."""
        if isinstance(unraisable.exc_value, Interrupted):
            self._exit_now()
        self._unraisable(unraisable)


_in_force: SignalHandlers | None = None


def check_signals() -> None:
    """Stop here if a signal was received and its exception was swallowed.

    Raises:
        Interrupted: there was one.
    """
    if _in_force is not None and _in_force.received:
        raise _in_force.error()
