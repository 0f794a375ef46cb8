"""The log of a training: its metrics file, and the trackers that were asked for. The first process has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.outputs import MetricsFile, read_metrics
from tisdpo_cli.runs.trackers import TrackerConfig, Trackers, start_trackers


class RunLog:
    """Takes the metrics of every step, on the first process; on others it does nothing."""

    def __init__(
        self, path: Path | None, resume_step: int | None, trackers: TrackerConfig | None, reporter: Reporter
    ) -> None:
        """Open the log.

        Args:
            path: the metrics file, or None on a process that keeps none.
            resume_step: the step that the run resumes after, or None if it starts.
            trackers: which trackers to start, or None.
            reporter: gets warnings.

        Raises:
            TrainingError: a tracker does not start.
        """
        self._file: MetricsFile | None = None
        self._trackers: Trackers | None = None
        if path is None:
            return
        logged = read_metrics(path)
        self._file = MetricsFile(path, resume_step, reporter.warn)
        if trackers is not None:
            self._trackers = start_trackers(trackers, resume_step, logged, reporter.warn)

    def write(self, record: Mapping[str, Any]) -> None:
        """Take the metrics of a step."""
        if self._file is not None:
            self._file.write(record)
        if self._trackers is not None:
            self._trackers.log(record)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trackers is not None:
            self._trackers.close()
