"""Small things done with files by several modules: hashes, whole-or-absent writes, near matches of a path."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tisdpo_cli.errors import TrainingError

PARTIAL = ".partial-"
# Two names that say what a directory is: an output of this program, and a finished one.
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"


def cache_directory() -> Path:
    """What is kept between runs: `$XDG_CACHE_HOME/tisdpo`, `~/.cache/tisdpo` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tisdpo"


def is_unfinished(path: Path) -> bool:
    """Whether a directory is an output of this program that lacks its completion marker."""
    return (path / CONFIG_FILE).is_file() and not (path / RUN_FILE).is_file()


def sha256(*paths: Path, named: bool = False) -> str:
    """SHA-256 over the bytes of files, of directories those in them, and over their names where `named`."""
    digest = hashlib.sha256()
    for path in (file for given in paths for file in _files_of(given)):
        if named:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _files_of(path: Path) -> list[Path]:
    return sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON under another name, then rename: the file is whole or absent."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under another name, then rename: the file is whole or absent."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with reporting_write_errors(path):
        partial.write_text(text, encoding="utf-8")
        sync([partial])
        partial.replace(path)


@contextmanager
def reporting_write_errors(
    path: Path, what: str = "cannot be written", kind: type[TrainingError] = TrainingError
) -> Iterator[None]:
    """Turn a full disk or a missing permission into a fault that names the file.

    Raises:
        TrainingError: what is written inside cannot be written.
    """
    try:
        yield
    except Exception as fault:
        # safetensors has an error type of its own for what the system reports.
        if not isinstance(fault, OSError) and type(fault).__name__ != "SafetensorError":
            raise
        reason = getattr(fault, "strerror", None) or str(fault)
        fix = "make room or write elsewhere; what was written before is whole"
        raise kind(f"{what}: {reason}", where=str(path), fix=fix) from fault


def sync(paths: Iterable[Path]) -> None:
    """Force files or directories to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def near_matches(path: Path, directories: bool = False) -> str:
    """`, did you mean …?` with neighbours of a path that does not exist, or nothing."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    names = [entry.name for entry in parent.iterdir() if entry.is_dir() or not directories]
    close = difflib.get_close_matches(path.name, names, n=2, cutoff=0.6)
    return f", did you mean {' or '.join(str(parent / name) for name in close)}?" if close else ""
