"""Tensors cached between runs under a key of everything they depend on: whole or absent, verified on read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tisdpo_cli.errors import TrainingError
from tisdpo_cli.files import PARTIAL, cache_directory, reporting_write_errors, sync

if TYPE_CHECKING:
    from torch import Tensor

_NAME = "values"


def key_of(depends_on: Mapping[str, Any]) -> str:
    """The cache key of JSON-able values."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


class TensorCache:
    """A directory with one file per tensor."""

    def __init__(self, directory: Path | None, warn: Callable[[str], None]) -> None:
        """Cache tensors in a directory, or in the user's cache directory; `warn` is called when a write fails."""
        self.directory = reference_directory(directory)
        self._warn = warn

    def read(self, key: str) -> Tensor | None:
        """The tensor under a key, or None if there is none or it is damaged."""
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensor, digest = file.get_tensor(_NAME), (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            tensor, digest = None, None
        if tensor is None or _digest(tensor) != digest:
            self._warn(f"{path} is damaged; recomputing")
            return None
        return tensor

    def write(self, key: str, tensor: Tensor) -> None:
        """Cache a tensor; a failure to write is only a warning."""
        from safetensors.torch import save_file

        path = self._path(key)
        partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
        try:
            with reporting_write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({_NAME: tensor}, partial, metadata={"sha256": _digest(tensor)})
                sync([partial])
                partial.replace(path)
        except TrainingError as fault:
            self._warn(f"{fault.where}: {fault.what}; reference log-probs are not cached")

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.safetensors"


def reference_directory(directory: Path | None = None) -> Path:
    """Where reference log-probs are cached, in a directory or in the user's cache directory."""
    return (directory or cache_directory()) / "reference"


def size_of(directory: Path) -> tuple[int, int]:
    """The number of files in a directory and their total size in bytes."""
    sizes = [path.stat().st_size for path in directory.rglob("*.safetensors")] if directory.is_dir() else []
    return len(sizes), sum(sizes)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
