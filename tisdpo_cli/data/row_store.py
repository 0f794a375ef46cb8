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
from typing import Any, BinaryIO, Protocol

from filelock import FileLock

from tisdpo_cli.cached_files import BOUND, Warn, row_files
from tisdpo_cli.data.arrow_files import ArrowFile, in_memory, open_arrow
from tisdpo_cli.files import PARTIAL, replacing

# Anything that changes what a file of the same key holds changes this.
REVISION = 1
# Seconds in which the first process of a machine begins what the others wait for.
_GRACE = 5.0
_SUFFIX = ".arrow"

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
    ) -> None:
        """Keep files in a directory.

        Args:
            directory: the directory, or None for the user's cache directory.
            warn: called when a file is damaged or cannot be written.
            progress: shows progress.
            bound: largest total size in bytes.
        """
        self._files = row_files(directory, bound)
        self._warn, self.progress = warn, progress
        self._open: dict[str, ArrowFile] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def file(self, depends_on: Mapping[str, Any] | None, build: Build) -> ArrowFile:
        """The file of these JSON-able values, which is built if there is none.

        Args:
            depends_on: everything that its content depends on; None for a file that only this process uses.
            build: writes it.
        """
        if depends_on is None:
            return self._build_elsewhere(build)
        key = hashlib.sha256(json.dumps([REVISION, depends_on], sort_keys=True).encode()).hexdigest()
        if key not in self._open:
            self._open[key] = self._known(key) or self._build(key, build)
        return self._open[key]

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
        path = self._files.path(key)
        try:
            with self._alone(path):
                known = self._known(key)
                if known is not None:
                    return known
                with replacing(path, tag=f"{uuid.uuid4().hex}-") as partial, partial.open("wb") as stream:
                    build(stream)
                file = open_arrow(path)
                if file is None:
                    raise OSError("what was written reads back differently")
                self._files.make_room(file.size)
                return file
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self._warn(f"{path}: cannot be written: {reason}; the dataset is read again by the next run")
        return self._build_elsewhere(build)

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Let one process at a time build a file, the first one of this machine before the others of its launcher."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_path = path.with_name(f"{PARTIAL}{path.stem}.lock")
        begun = time.monotonic()
        waits = os.environ.get("LOCAL_RANK", "0") != "0"
        while waits and time.monotonic() - begun < _GRACE and not (path.exists() or lock_path.exists()):
            time.sleep(0.02)
        with FileLock(lock_path):
            try:
                yield
            finally:
                with suppress(OSError):
                    lock_path.unlink()

    def _build_elsewhere(self, build: Build) -> ArrowFile:
        """Build a temporary file, or a file in memory."""
        try:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="tisdpo-rows-")
            path = Path(self._temporary.name) / f"{uuid.uuid4().hex}{_SUFFIX}"
            with path.open("wb") as stream:
                build(stream)
            file = open_arrow(path)
            if file is not None:
                return file
        except OSError:
            pass
        content = io.BytesIO()
        build(content)
        return in_memory(content.getvalue())
