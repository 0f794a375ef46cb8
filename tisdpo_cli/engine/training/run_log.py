"""The log of a training: its metrics file, the trackers that were asked for, and warnings of what the metrics show.

The first process has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tisdpo_cli.engine.training.health import Finding, Health, HealthConfig
from tisdpo_cli.engine.training.samples import SampleConfig, SampleLog
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.outputs import MetricsFile, read_metrics
from tisdpo_cli.runs.trackers import TrackerConfig, Trackers, start_trackers


@dataclass(frozen=True)
class Watching:
    """What shows a training while it runs, besides its metrics file.

    Attributes:
        profile: directory for a profile of some updates, or None.
        trackers: those that get the metrics, or None.
        health: of a preference training, what its metrics are judged by, or None.
        samples: what is sampled, or None.
    """

    profile: Path | None = None
    trackers: TrackerConfig | None = None
    health: HealthConfig | None = None
    samples: SampleConfig | None = None


class RunLog:
    """Takes the metrics of every step, on the first process; on others it does nothing."""

    def __init__(self, path: Path | None, resume_step: int | None, watching: Watching, reporter: Reporter) -> None:
        """Open the log.

        Args:
            path: the metrics file, or None on a process that keeps none.
            resume_step: the step that the run resumes after, or None if it starts.
            watching: what shows the training.
            reporter: gets warnings.

        Raises:
            TrainingError: a tracker does not start.
        """
        self._file: MetricsFile | None = None
        self._trackers: Trackers | None = None
        self._samples: SampleLog | None = None
        self._reporter = reporter
        self._health = Health(watching.health) if watching.health is not None else None
        if path is None:
            return
        logged = read_metrics(path)
        self._file = MetricsFile(path, resume_step, reporter.warn)
        kept = [record for record in logged if resume_step is not None and record["step"] <= resume_step]
        if self._health is not None:
            for record in kept:
                self._health.observe(record)
        if watching.samples is not None:
            self._samples = SampleLog(watching.samples, resume_step, reporter.warn)
        if watching.trackers is not None:
            self._trackers = start_trackers(watching.trackers, resume_step, logged, reporter.warn)

    @property
    def findings(self) -> list[Finding]:
        """What the metrics have shown."""
        return self._health.findings if self._health is not None else []

    def write(self, record: Mapping[str, Any]) -> None:
        """Take the metrics of a step."""
        if self._file is not None:
            self._file.write(record)
        if self._trackers is not None:
            self._trackers.log(record)
        if self._file is not None and self._health is not None:
            for finding in self._health.observe(record):
                self._reporter.warn(finding.text)

    def sample(self, step: int) -> None:
        """Write samples of the policy after a step."""
        if self._samples is not None:
            self._samples.write(step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trackers is not None:
            self._trackers.close()
