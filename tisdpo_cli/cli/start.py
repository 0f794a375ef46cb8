"""Where the program starts: signals and streams are in order before anything heavy is imported."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

from tisdpo_cli.cli.process import configure_openmp, leave
from tisdpo_cli.cli.signals import SignalHandlers
from tisdpo_cli.cli.streams import prepare_streams
from tisdpo_cli.runs.worker import end_with_launcher


def main() -> NoReturn:
    """Run the program and exit with 0, 1, 2, or 128 and the number of a signal."""
    with SignalHandlers() as signals:
        end_with_launcher()
        prepare_streams()
        configure_openmp()
        try:
            # A shell asks for completions by a variable of Typer's.
            name = "completion" if "_TISDPO_COMPLETE" in os.environ else "app"
            app = importlib.import_module(f"tisdpo_cli.cli.{name}")
        except BaseException:
            if not signals.received:
                raise
            # What reports errors may be half imported.
            signals.report()
            leave(signals.exit_code)
        leave(app.run(sys.argv[1:], signals))
