"""Where rows and tokens are kept: Arrow files under a key of everything that they depend on, whole or absent.

A file is built once, by one process; others that want the same one wait for it. Where the cache directory cannot be
written, a temporary file takes its place, and where that cannot be written either, memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from filelock import FileLock, Timeout

from tisdpo_cli.cached_files import BOUND, Warn, row_files
from tisdpo_cli.data.arrow_files import ArrowFile, in_memory, open_arrow
from tisdpo_cli.errors import DataError
from tisdpo_cli.files import PARTIAL, replacing, temporary_directory

# Anything that changes what a file of the same key holds changes this.
REVISION = 2
# Seconds in which the first process of a machine begins what the others wait for.
_GRACE = 5.0
# Seconds of waiting for another run without a word.
_QUIET = 5.0
_SUFFIX = ".arrow"

# Rows are the user's own: nobody else reads them.
_DIRECTORY_MODE, _FILE_MODE = 0o700, 0o600

# Writes a file; may be called again with another stream if the first one cannot be written.
Build = Callable[[BinaryIO], None]


class Advance(Protocol):
    """Progress of the work; see `reporter.Progress`."""

    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        """Add finished units."""


# From a title, a total, what is done of it and its unit.
ShowProgress = Callable[[str, int, int, str], AbstractContextManager[Advance]]


class _Silent:
    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        """Do nothing."""


def no_progress(_title: str, _total: int, _done: int, _unit: str) -> AbstractContextManager[Advance]:
    """Show nothing."""
    return nullcontext(_Silent())


class RowStore:
    """Arrow files by key."""

    def __init__(
        self,
        directory: Path | None = None,
        warn: Warn = lambda _text: None,
        progress: ShowProgress = no_progress,
        bound: int = BOUND,
        note: Warn = lambda _text: None,
    ) -> None:
        """Keep files in a directory.

        Args:
            directory: the directory, or None for the user's cache directory.
            warn: called when a file is damaged or cannot be written.
            progress: shows progress.
            bound: largest total size in bytes.
            note: called when another run is waited for.
        """
        self._files, self._bound = row_files(directory, bound), bound
        self._warn, self._note, self.progress = warn, note, progress
        self._open: dict[str, ArrowFile] = {}
        self._too_large = False
        self._temporary: list[tempfile.TemporaryDirectory[str]] = []

    def file(self, depends_on: Mapping[str, Any] | None, build: Build) -> ArrowFile:
        """The file of these JSON-able values, which is built if there is none.

        Args:
            depends_on: everything that its content depends on; None for a file that only this process uses.
            build: writes it; its own errors pass.
        """
        try:
            if depends_on is None:
                return self._build_elsewhere(build)
            key = hashlib.sha256(json.dumps([REVISION, depends_on], sort_keys=True).encode()).hexdigest()
            if key not in self._open:
                self._open[key] = self._known(key) or self._build(key, build)
            return self._open[key]
        except _OfBuild as passing:
            raise passing.error from passing.error.__cause__

    def _known(self, key: str) -> ArrowFile | None:
        path = self._files.path(key)
        try:
            file = open_arrow(path)
        except OSError:  # there is none, or another process made room
            return None
        if file is None:
            self._warn(f"{path} is damaged; reading the dataset again")
            with suppress(OSError):
                path.unlink()
            return None
        self._files.used(path)
        return file

    def _build(self, key: str, build: Build) -> ArrowFile:
        path, asked = self._files.path(key), time.time()
        try:
            with self._alone(path):
                known = self._known(key)
                if known is not None:
                    return known
                _remove_partials(path)
                tag = f"{uuid.uuid4().hex}-"
                with (
                    _sharing_fault(path, asked),
                    replacing(path, tag, _FILE_MODE) as partial,
                    partial.open("wb") as stream,
                ):
                    _build(build, stream)
                file = open_arrow(path)
                if file is None:
                    raise OSError("what was written reads back differently")
                self._make_room(file)
                return file
        except (_Unwritable, OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self._warn(f"{path}: cannot be written: {reason}; the dataset is read again by the next run")
        return self._build_elsewhere(build)

    def _make_room(self, written: ArrowFile) -> None:
        """Remove what other runs left, if that is needed, and nothing that this one uses."""
        used = [*self._open.values(), written]
        self._files.make_room(written.size, {file.path for file in used if file.path is not None})
        size = sum(file.size for file in used)
        if size > self._bound and not self._too_large:
            self._too_large = True
            self._warn(
                f"{self._files.directory}: this dataset takes {size / 2**30:.1f} GiB, more than the "
                f"{self._bound / 2**30:.1f} GiB that are kept between runs; no other dataset is kept beside it"
            )

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Let one process at a time build a file, the first one of this machine before the others of its launcher."""
        for folder in (self._files.directory, path.parent):
            folder.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
        lock_path = path.with_name(f"{PARTIAL}{path.stem}.lock")
        begun = time.monotonic()
        waits = os.environ.get("LOCAL_RANK", "0") != "0"
        while waits and time.monotonic() - begun < _GRACE and not (path.exists() or lock_path.exists()):
            time.sleep(0.02)
        lock = FileLock(lock_path, mode=_FILE_MODE)
        try:
            lock.acquire(timeout=-1 if waits else _QUIET)
        except Timeout:
            self._note("waiting for another run that reads this dataset")
            lock.acquire()
        try:
            yield
        finally:
            with suppress(OSError):
                lock_path.unlink()
            lock.release()

    def _build_elsewhere(self, build: Build) -> ArrowFile:
        """Build a temporary file, or a file in memory."""
        try:
            directory = temporary_directory("tisdpo-rows-")
            try:
                path = Path(directory.name) / f"{uuid.uuid4().hex}{_SUFFIX}"
                with path.open("wb") as stream:
                    _build(build, stream)
                file = open_arrow(path)
            except BaseException:
                directory.cleanup()
                raise
            if file is not None:
                self._temporary.append(directory)
                return file
        except (_Unwritable, OSError):
            pass
        content = io.BytesIO()
        build(content)
        return in_memory(content.getvalue())


class _Unwritable(Exception):
    """A file cannot be written while it is built."""


class _OfBuild(Exception):
    """An error of a build itself, which says nothing about where it writes."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _build(build: Build, stream: BinaryIO) -> None:
    try:
        build(cast(BinaryIO, _Target(stream)))
    except (OSError, NotImplementedError) as error:
        raise _OfBuild(error) from error


class _Target:
    """A stream whose errors differ from all others."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, content: Any) -> int:
        """Write."""
        try:
            return self._stream.write(content)
        except OSError as error:
            raise _Unwritable(error.strerror or str(error)) from error

    def flush(self) -> None:
        """Write what waits."""
        try:
            self._stream.flush()
        except OSError as error:
            raise _Unwritable(error.strerror or str(error)) from error


@contextmanager
def _sharing_fault(path: Path, asked: float) -> Iterator[None]:
    """Leave a fault of the data to the processes that wait for this one, which would read it all to meet the same.

    Args:
        path: the file to build.
        asked: when this process began to wait, in seconds of `time.time`; an older fault is not its own.

    Raises:
        DataError: this process met a fault, or another one while this one waited.
    """
    record = path.with_name(f"{PARTIAL}{path.stem}.fault")
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(record.read_bytes())
        if known["at"] < asked:
            record.unlink()
        else:
            raise DataError(known["what"], where=known["where"], fix=known["fix"], details=tuple(known["details"]))
    try:
        yield
    except DataError as fault:
        # Without a launcher nobody waits.
        if "LOCAL_RANK" in os.environ:
            told = {"at": time.time(), "what": fault.what, "where": fault.where, "fix": fault.fix}
            with suppress(OSError), replacing(record, mode=_FILE_MODE) as partial:
                partial.write_text(json.dumps({**told, "details": fault.details}), encoding="utf-8", newline="\n")
        raise


def _remove_partials(path: Path) -> None:
    """Remove what processes left that were killed while they built this file."""
    for leftover in path.parent.glob(f"{PARTIAL}*-{path.name}"):
        with suppress(OSError):
            leftover.unlink()
