"""Tensors cached between runs under a key of everything they depend on: whole or absent, verified on read, bounded."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tisdpo_cli.cached_files import BOUND, Warn, reference_files
from tisdpo_cli.errors import TrainingError, is_out_of_memory
from tisdpo_cli.files import replacing, reporting_write_errors

if TYPE_CHECKING:
    from torch import Tensor

_NAME, _DTYPE = "values", "F32"


def key_of(depends_on: Mapping[str, Any]) -> str:
    """The cache key of JSON-able values."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


class TensorCache:
    """A directory with one file per tensor of float32 values."""

    def __init__(self, directory: Path | None, warn: Warn, bound: int = BOUND) -> None:
        """Cache tensors in a directory.

        Args:
            directory: the directory, or None for the user's cache directory.
            warn: called when a file is damaged or cannot be written.
            bound: largest total size in bytes.
        """
        self._files = reference_files(directory, bound)
        self._warn = warn

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self._files.directory

    def read(self, key: str, length: int) -> Tensor | None:
        """The tensor [length] under a key, or None if there is none or it is damaged."""
        path = self._files.path(key)
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
        self._files.used(path)
        return tensor

    def write(self, key: str, tensor: Tensor) -> None:
        """Cache a tensor [N] of float32; a failure to write is only a warning."""
        from safetensors.torch import save_file

        path = self._files.path(key)
        try:
            with reporting_write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path, tag=f"{os.getpid()}-") as partial:
                    save_file({_NAME: tensor}, partial, metadata={"sha256": _digest(tensor, key)})
                self._files.make_room(path.stat().st_size)
        except TrainingError as fault:
            self._warn(f"{fault.where}: {fault.what}; reference log-probs are not cached")


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
