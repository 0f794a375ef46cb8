"""A profile of some updates: a trace to open in a browser, and a table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from tisdpo_cli.files import reporting_write_errors, write_text

TRACE, TABLE = "trace.json", "table.txt"
_UPDATES, _ROWS = 3, 40


@contextmanager
def profiled(directory: Path | None, updates: int) -> Iterator[Callable[[], None]]:
    """Profile three updates, skipping the first if there are more; yields a function to call after each update.

    Args:
        directory: receives the trace and the table; None for no profile.
        updates: number of updates in the run.
    """
    if directory is None or updates < 1:
        yield lambda: None
        return
    with reporting_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)

    def write(found: profile) -> None:
        with reporting_write_errors(directory):
            found.export_chrome_trace(str(directory / TRACE))
        on_gpu = ProfilerActivity.CUDA in supported_activities()
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        write_text(directory / TABLE, found.key_averages().table(sort_by=order, row_limit=_ROWS) + "\n")

    before = min(1, updates - 1)
    with warnings.catch_warnings():
        # Torch warns about a profile without warm-up, which a single update has no room for.
        warnings.simplefilter("ignore")
        times = schedule(wait=0, warmup=before, active=min(_UPDATES, updates - before), repeat=1)
    with profile(schedule=times, on_trace_ready=write, profile_memory=True) as running:
        yield running.step
