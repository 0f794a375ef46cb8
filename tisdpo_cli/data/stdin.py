"""Rows from stdin, kept in a temporary file so that they can be read several times. Knows no rows."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

from tisdpo_cli.errors import UsageError

STDIN = "-"
_NAME = "stdin"


@cache
def spooled_stdin() -> Path:
    """Copy stdin to a temporary file, once, and return it; its suffix is that of the format that its start shows.

    Raises:
        UsageError: stdin is a terminal, or several processes would share it.
    """
    where = f"--dataset {STDIN}"
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError("stdin cannot be read by several processes", where=where, fix="save the rows to a file")
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("stdin is a terminal", where=where, fix="pipe rows into the command, or give a file")
    folder = Path(tempfile.mkdtemp(prefix="tisdpo-stdin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    raw = folder / _NAME
    with raw.open("wb") as target:
        shutil.copyfileobj(sys.stdin.buffer, target, 2**20)
    with raw.open("rb") as stream:
        suffix = _suffix(stream.read(2**12))
    return raw.rename(raw.with_name(f"{_NAME}{suffix}"))


def is_stdin(path: Path) -> bool:
    """Return whether a file holds what came from stdin."""
    return path.stem.startswith(_NAME) and path.parent.name.startswith("tisdpo-stdin-")


def _suffix(start: bytes) -> str:
    if start.startswith(b"PAR1"):
        return ".parquet"
    if start.startswith(b"\x1f\x8b"):
        return ".jsonl.gz"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] in (b"{", b"["):
        return ".jsonl"
    return ".csv" if any(mark in text.split(b"\n")[0] for mark in (b",", b";", b"\t", b"|")) else ".jsonl"
