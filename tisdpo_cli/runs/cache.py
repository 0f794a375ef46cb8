"""Tensors cached between runs under a key of everything they depend on: whole or absent, verified on read, bounded."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tisdpo_cli.errors import TrainingError, is_out_of_memory
from tisdpo_cli.files import PARTIAL, cache_directory, replacing, reporting_write_errors

if TYPE_CHECKING:
    from torch import Tensor

# Size at which the files that were not used for longest are removed, in bytes.
BOUND = 20 * 2**30
# After a removal, so that the next write needs none.
_KEPT_SHARE = 0.9
_NAME, _DTYPE, _FILES = "values", "F32", "*.safetensors"
# What killed processes leave: ours, and the temporary files of safetensors.
_LEFTOVERS, _LEFTOVER_SECONDS = (f"{PARTIAL}*", ".tmp*"), 24 * 3600


def key_of(depends_on: Mapping[str, Any]) -> str:
    """The cache key of JSON-able values."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


class TensorCache:
    """A directory with one file per tensor of float32 values."""

    def __init__(self, directory: Path | None, warn: Callable[[str], None], bound: int = BOUND) -> None:
        """Cache tensors in a directory.

        Args:
            directory: the directory, or None for the user's cache directory.
            warn: called when a file is damaged or cannot be written.
            bound: largest total size in bytes.
        """
        self.directory = reference_directory(directory)
        self._warn, self._bound = warn, bound
        # Known after the first write.
        self._size: int | None = None

    def read(self, key: str, length: int) -> Tensor | None:
        """The tensor [length] under a key, or None if there is none or it is damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            tensor = _load(path, key, length)
        except FileNotFoundError:  # another process made room
            return None
        except Exception as error:  # whatever a damaged file makes a library raise
            if is_out_of_memory(error):
                raise
            tensor = None
        if tensor is None:
            self._warn(f"{path} is damaged; recomputing")
            return None
        with suppress(OSError):
            os.utime(path)  # used just now
        return tensor

    def write(self, key: str, tensor: Tensor) -> None:
        """Cache a tensor [N] of float32; a failure to write is only a warning."""
        from safetensors.torch import save_file

        path = self._path(key)
        try:
            with reporting_write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path, tag=f"{os.getpid()}-") as partial:
                    save_file({_NAME: tensor}, partial, metadata={"sha256": _digest(tensor, key)})
                self._make_room(path.stat().st_size)
        except TrainingError as fault:
            self._warn(f"{fault.where}: {fault.what}; reference log-probs are not cached")

    def _make_room(self, written: int) -> None:
        if self._size is None:
            _remove_leftovers(self.directory)
            self._size = size_of(self.directory)[1]
        else:
            self._size += written
        if self._size > self._bound:
            self._size = _prune(self.directory, int(self._bound * _KEPT_SHARE))

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.safetensors"


def _load(path: Path, key: str, length: int) -> Tensor | None:
    """The tensor of a file, or None if it is not the one that was written for this key."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        described = file.get_slice(_NAME)
        # Before anything is read: the header may claim any size.
        if described.get_dtype() != _DTYPE or described.get_shape() != [length]:
            return None
        tensor, digest = file.get_tensor(_NAME), (file.metadata() or {}).get("sha256")
    return tensor if _digest(tensor, key) == digest and bool(torch.isfinite(tensor).all()) else None


def _digest(tensor: Tensor, key: str) -> str:
    return hashlib.sha256(key.encode() + tensor.numpy().tobytes()).hexdigest()


# The directory ------------------------------------------------------------------------------------------------


def reference_directory(directory: Path | None = None) -> Path:
    """Where reference log-probs are cached, in a directory or in the user's cache directory."""
    return (directory or cache_directory()) / "reference"


def size_of(directory: Path) -> tuple[int, int]:
    """The number of files in a cache and their total size in bytes."""
    sizes = [size for _, size, _ in _files(directory)]
    return len(sizes), sum(sizes)


def clear(directory: Path) -> tuple[int, int]:
    """Remove all files of a cache; returns their number and total size in bytes.

    Raises:
        TrainingError: a file cannot be removed.
    """
    found = _files(directory)
    with reporting_write_errors(directory, "the cache cannot be cleared"):
        for path, *_ in found:
            path.unlink(missing_ok=True)
    _remove_leftovers(directory, age=0)
    for folder in (*directory.glob("*"), directory):
        with suppress(OSError):  # other files may be in it
            folder.rmdir()
    return len(found), sum(size for _, size, _ in found)


def _files(directory: Path) -> list[tuple[Path, int, float]]:
    """(path, bytes, time of last use) of every cached file."""
    found = []
    for path in directory.glob(f"*/{_FILES}"):
        with suppress(OSError):  # another process made room
            status = path.lstat()
            found.append((path, status.st_size, max(status.st_atime, status.st_mtime)))
    return found


def _prune(directory: Path, bound: int) -> int:
    """Remove the files that were not used for longest, down to a size; returns the size that is left."""
    found = sorted(_files(directory), key=lambda entry: entry[2])
    size = sum(entry[1] for entry in found)
    for path, bytes_freed, _ in found:
        if size <= bound:
            break
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


def cpu_model() -> str:
    """What identifies the CPU: kernels for another one round differently."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        names = [
            line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(("model name", "CPU part"))
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
