"""Directories of what is kept between runs, bounded in size: the files that were not used for longest make room."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from tisdpo_cli.files import PARTIAL, cache_directory, reporting_write_errors

# Called with a message that the user should see.
Warn = Callable[[str], None]

# Size at which the files that were not used for longest are removed, in bytes.
BOUND = 20 * 2**30
# After a removal, so that the next write needs none.
_KEPT_SHARE = 0.9
# What killed processes leave: ours, and the temporary files of safetensors.
_LEFTOVERS, _LEFTOVER_SECONDS = (f"{PARTIAL}*", ".tmp*"), 24 * 3600


class BoundedDirectory:
    """A directory of cached files, each at `<two letters>/<name><suffix>`, whose total size is bounded."""

    def __init__(self, directory: Path, suffix: str, bound: int = BOUND) -> None:
        """Describe a directory, which need not exist.

        Args:
            directory: the directory.
            suffix: of its files.
            bound: largest total size in bytes.
        """
        self.directory = directory
        self._suffix, self._bound = suffix, bound
        # Known after the first write.
        self._size: int | None = None

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.directory / key[:2] / f"{key}{self._suffix}"

    def used(self, path: Path) -> None:
        """Note that a file was used just now."""
        with suppress(OSError):
            os.utime(path)

    def make_room(self, written: int, keep: Collection[Path] = ()) -> None:
        """Remove the files that were not used for longest if the directory has grown too large.

        Args:
            written: bytes that were just added.
            keep: files that stay, however large they are.
        """
        if self._size is None:
            _remove_leftovers(self.directory)
            self._size = self.size()[1]
        else:
            self._size += written
        if self._size > self._bound:
            self._size = self._prune(int(self._bound * _KEPT_SHARE), keep)

    def size(self) -> tuple[int, int]:
        """The number of files and their total size in bytes."""
        sizes = [size for _, size, _ in self._files()]
        return len(sizes), sum(sizes)

    def clear(self) -> tuple[int, int]:
        """Remove all files; returns their number and total size in bytes.

        Raises:
            TrainingError: a file cannot be removed.
        """
        found = self._files()
        with reporting_write_errors(self.directory, "the cache cannot be cleared"):
            for path, *_ in found:
                path.unlink(missing_ok=True)
        _remove_leftovers(self.directory, age=0)
        for folder in (*self.directory.glob("*"), self.directory):
            with suppress(OSError):  # other files may be in it
                folder.rmdir()
        return len(found), sum(size for _, size, _ in found)

    def _files(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, time of last use) of every cached file."""
        found = []
        for path in self.directory.glob(f"*/*{self._suffix}"):
            if path.name.startswith(PARTIAL):
                continue
            with suppress(OSError):  # another process made room
                status = path.lstat()
                found.append((path, status.st_size, max(status.st_atime, status.st_mtime)))
        return found

    def _prune(self, bound: int, keep: Collection[Path]) -> int:
        """Remove the other files that were not used for longest, down to a size; returns the size that is left."""
        found = sorted(self._files(), key=lambda entry: entry[2])
        size = sum(entry[1] for entry in found)
        for path, bytes_freed, _ in found:
            if size <= bound:
                break
            if path in keep:
                continue
            with suppress(OSError):
                path.unlink(missing_ok=True)
                size -= bytes_freed
        return size


def _remove_leftovers(directory: Path, age: float = _LEFTOVER_SECONDS) -> None:
    before = time.time() - age
    for pattern in _LEFTOVERS:
        for path in directory.glob(f"*/{pattern}"):
            with suppress(OSError):
                if path.lstat().st_mtime <= before:
                    path.unlink()


def reference_files(directory: Path | None = None, bound: int = BOUND) -> BoundedDirectory:
    """Reference log-probs, in a directory or in the user's cache directory."""
    return BoundedDirectory((directory or cache_directory()) / "reference", ".safetensors", bound)


def row_files(directory: Path | None = None, bound: int = BOUND) -> BoundedDirectory:
    """Rows and tokens of datasets, in a directory or in the user's cache directory."""
    return BoundedDirectory((directory or cache_directory()) / "rows", ".arrow", bound)
