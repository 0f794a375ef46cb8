"""File helpers of several modules: hashes, atomic writes, removal, suggestions for a mistyped path."""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tisdpo_cli.errors import TrainingError

PARTIAL = ".partial-"
# The first marks a directory as an output of this program, the second as a finished one.
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"


def cache_directory() -> Path:
    """Return the cache directory: `$XDG_CACHE_HOME/tisdpo`, by default `~/.cache/tisdpo`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tisdpo"


def is_unfinished(path: Path) -> bool:
    """Return whether a directory is an output of this program without its completion marker."""
    return (path / CONFIG_FILE).is_file() and not (path / RUN_FILE).is_file()


def sha256(*paths: Path, named: bool = False) -> str:
    """Return SHA-256 over the bytes of files and of the files in directories, and their names if `named`."""
    digest = hashlib.sha256()
    for path in (file for root in paths for file in _files_of(root)):
        if named:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(inner for inner in path.rglob("*") if inner.is_file())
    return matching_files(path) or [path]


def matching_files(path: Path) -> list[Path]:
    """Return the files that a glob pattern matches, sorted; none for a path that exists or has no wildcard."""
    if not glob.has_magic(str(path)) or path.exists():
        return []
    matches = (Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - takes absolute patterns
    return sorted(match for match in matches if match.is_file())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON to a temporary file, then rename it, so that the file is complete or absent."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text to a temporary file, then rename it, so that the file is complete or absent."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, with their ends, as they are made; the file is complete or absent."""
    with reporting_write_errors(path), replacing(path) as partial, _text(partial) as stream:
        stream.writelines(lines)


def _text(path: Path) -> TextIO:
    # The same bytes on every system.
    return path.open("w", encoding="utf-8", newline="\n")


@contextmanager
def replacing(path: Path, tag: str = "", mode: int = 0o666) -> Iterator[Path]:
    """Write a file elsewhere and rename it, so that it is complete or absent.

    The temporary file is new: whatever has its name, such as a symbolic link, is removed and never written through. It
    is removed when the block fails. The file gets the permissions of the umask, whatever the writer of the block sets.

    Args:
        path: the file.
        tag: part of the temporary name, for a directory that several processes write to.
        mode: permissions, less those that the umask withholds.

    Yields:
        The temporary file, empty.

    Raises:
        OSError: the file cannot be written; see `reporting_write_errors`.
    """
    partial = path.with_name(f"{PARTIAL}{tag}{path.name}")
    remove(partial)
    try:
        mode = _create(partial, mode)
        yield partial
        partial.chmod(mode)
        sync([partial])
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _create(path: Path, mode: int) -> int:
    """Create an empty file that must not exist; returns its permissions."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), mode)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


_temporary: weakref.WeakSet[tempfile.TemporaryDirectory[str]] = weakref.WeakSet()


def temporary_directory(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A directory that lasts as long as what is returned, or until `remove_temporary`."""
    # A file that is open or mapped cannot be removed on Windows.
    directory = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    _temporary.add(directory)
    return directory


def remove_temporary() -> None:
    """Remove all temporary directories, before this process ends without shutting the interpreter down."""
    for directory in list(_temporary):
        directory.cleanup()


def remove(path: Path) -> None:
    """Remove a file, a link (not what it names) or a directory; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partials(directory: Path) -> None:
    """Remove temporary files that a killed process left in a directory."""
    for leftover in directory.glob(f"{PARTIAL}*"):
        remove(leftover)


@contextmanager
def reporting_write_errors(
    path: Path,
    what: str = "cannot be written",
    kind: type[TrainingError] = TrainingError,
    fix: str = "free disk space or write elsewhere; files written before are complete",
) -> Iterator[None]:
    """Turn a full disk or a missing permission into an error that names the file.

    Args:
        path: file that the block writes.
        what: message.
        kind: type of the error.
        fix: what to do about it.

    Raises:
        TrainingError: the block cannot write the file.
    """
    try:
        yield
    except Exception as error:
        # safetensors has a separate error type for system errors.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise kind(f"{what}: {reason}", where=str(path), fix=fix) from error


def sync(paths: Iterable[Path]) -> None:
    """Flush files or directories to the disk; Windows flushes no directory, and a file only where it may be written."""
    windows = not hasattr(os, "O_DIRECTORY")
    for path in paths:
        if windows and path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def near_matches(path: Path, directories: bool = False) -> str:
    """Return `, did you mean …?` with similar names in the directory of a missing path, or nothing."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() or not directories]
    close = difflib.get_close_matches(path.name, names, n=2, cutoff=0.6)
    return f", did you mean {' or '.join(str(parent / name) for name in close)}?" if close else ""
