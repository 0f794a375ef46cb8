"""`--num-processes`: the command again as several processes of this machine, watched until all have ended.

What `torchrun` does for one machine, with three differences: the exit code is that of the command, the last line on
stderr is its error, and after a signal the processes have the time that a checkpoint takes.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tisdpo_cli.errors import Interrupted, TisdpoError, TrainingError, UsageError
from tisdpo_cli.runs.launch_checks import asked_for
from tisdpo_cli.runs.worker import read_error, worker_environment

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Windows ends processes in one way only.
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
_POLL_SECONDS = 0.05
# After one process has failed the others may report the same error; they are told to end, and then ended.
_FAILED_SECONDS, _ENDING_SECONDS = 3.0, 30.0
# After a second signal nothing is saved any more.
_SECOND_SIGNAL_SECONDS = 5.0
_RESUME = "rerun the same command to resume"


def launch(count: int, arguments: Sequence[str]) -> None:
    """Run a command line of the program as several processes, and wait for all of them.

    Args:
        count: number of processes.
        arguments: of the program.

    Raises:
        UsageError: this process was started by a launcher itself, or there are fewer GPUs.
        TisdpoError, Interrupted: the error of the run, reported by none of its processes.
    """
    where = f"--num-processes {count}"
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            "a launcher has already started this process (WORLD_SIZE is set)", where=where, fix="use one of the two"
        )
    environment = {**_device_environment(count, where), **_thread_environment(count), **_path_environment()}
    with tempfile.TemporaryDirectory(prefix="tisdpo-run-") as folder:
        command = [sys.executable, "-m", "tisdpo_cli", *arguments]
        Processes(count, command, {**environment, **worker_environment(Path(folder))}, Path(folder)).run()


def _device_environment(count: int, where: str) -> dict[str, str]:
    """One GPU for each process, or the CPU for all."""
    if asked_for("ACCELERATE_USE_CPU"):
        return {}
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        return {"ACCELERATE_USE_CPU": "1"}
    if count > gpus:
        raise UsageError(
            f"this machine has {gpus} GPU{'s' * (gpus > 1)}",
            where=where,
            fix=f"use at most {gpus}, or set ACCELERATE_USE_CPU=1 to use the CPU",
        )
    return {}


def _thread_environment(count: int) -> dict[str, str]:
    """The threads of each process: its share of the cores."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // count))}


def _path_environment() -> dict[str, str]:
    """`python -m` puts the current directory first on the path; the installed program does not have it there."""
    return {} if {"", str(Path.cwd())} & set(sys.path) else {"PYTHONSAFEPATH": "1"}


class Processes:
    """The processes of a run.

    Args:
        count: number of processes.
        command: of each of them.
        environment: variables for all of them, beside those of this process.
        folder: where they leave their errors.
    """

    def __init__(self, count: int, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._count, self._command, self._folder = count, command, folder
        self._environment = {**os.environ, **environment}
        self._workers: list[subprocess.Popen[bytes]] = []
        # Ranks in the order in which they ended.
        self._ended: list[int] = []
        self._signals: list[int] = []
        self._terminate_at = self._kill_at = math.inf

    def run(self) -> None:
        """Start all, wait until all have ended, and raise what is to be reported, if anything."""
        from torch.distributed import TCPStore

        # The processes find each other here; another program may take a port that is only thought to be free.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # While this end of their stdin is open, they know that this process is alive.
        reading, writing = os.pipe()
        with self._forwarding_signals():
            try:
                for rank in range(self._count):
                    self._workers.append(self._start(rank, store.port, reading))
                os.close(reading)
                self._wait()
            finally:
                self._end_all(_KILL)
                os.close(writing)
        self._raise_error()

    def _start(self, rank: int, port: int, stdin: int) -> subprocess.Popen[bytes]:
        place = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._count, "LOCAL_WORLD_SIZE": self._count,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0,
        }  # fmt: skip
        return subprocess.Popen(
            self._command,
            env={**self._environment, **{name: str(value) for name, value in place.items()}},
            stdin=stdin,
            # The first one alone has a result.
            stdout=None if rank == 0 else 2,
            # Ctrl-C reaches this process alone, which forwards it once.
            start_new_session=True,
        )

    @contextmanager
    def _forwarding_signals(self) -> Iterator[None]:
        before: dict[int, Any] = {}
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._forward)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)
        if len(self._signals) > 1:
            self._kill_at = min(self._kill_at, time.monotonic() + _SECOND_SIGNAL_SECONDS)
        # On Windows Ctrl-C has reached all processes of the console already, and no other signal can be sent.
        if os.name == "posix" or number != signal.SIGINT:
            for worker in self._workers:
                worker.send_signal(number)

    def _wait(self) -> None:
        while len(self._ended) < self._count:
            for rank, worker in enumerate(self._workers):
                if rank not in self._ended and worker.poll() is not None:
                    self._ended.append(rank)
                    self._note_end(int(worker.returncode))
            if time.monotonic() > self._terminate_at:
                self._terminate_at = math.inf
                self._end_all(signal.SIGTERM)
            if time.monotonic() > self._kill_at:
                self._end_all(_KILL)
            time.sleep(_POLL_SECONDS)

    def _note_end(self, code: int) -> None:
        """The others cannot go on without one that failed or answered a signal."""
        if code and self._kill_at == math.inf:
            now = time.monotonic()
            self._kill_at = now + _ENDING_SECONDS
            if not self._signals:
                self._terminate_at = now + _FAILED_SECONDS

    def _end_all(self, number: int) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                worker.send_signal(number)

    def _raise_error(self) -> None:
        codes = [int(worker.returncode) for worker in self._workers]
        if not any(codes):
            return
        failed = [rank for rank in self._ended if codes[rank]]
        left = [read_error(self._folder, rank) for rank in failed]
        own = [found.error for found in left if found is not None and not found.only_follows]
        # One that was killed may be found after those that noticed it.
        killed = [rank for rank in failed if codes[rank] < 0]
        if killed and not self._signals and (killed[0] == failed[0] or not own):
            raise self._killed(killed[0], -codes[killed[0]])
        if own:
            raise own[0]
        if self._signals:
            stopped = [found.error for found in left if found is not None and isinstance(found.error, Interrupted)]
            raise (stopped or [Interrupted(self._signals[0], "interrupted", fix="rerun the same command")])[0]
        if left[0] is not None:
            raise left[0].error
        code = codes[failed[0]]
        raise TrainingError(f"process {failed[0] + 1} of {self._count} ended with exit code {code}", fix=_RESUME)

    def _killed(self, rank: int, number: int) -> TisdpoError:
        name = signal.Signals(number).name
        why = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        return TrainingError(f"process {rank + 1} of {self._count} was killed by {name}{why}", fix=_RESUME)
