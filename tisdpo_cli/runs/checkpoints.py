"""Checkpoints: whole or absent, verified before use. Tensors in safetensors, the rest in JSON; no pickle.

A checkpoint is a directory `step-00000120` with its tensor files and a manifest of their sizes and hashes. It is
written under another name and appears by one rename, so that a kill at any moment leaves the one before it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tisdpo_cli.errors import TrainingError, UsageError
from tisdpo_cli.files import PARTIAL, reporting_write_errors, sha256, sync

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "checkpoint.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        step: number of updates done.
        state: the JSON values saved with the tensors.
    """

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")


def save_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint and remove older ones.

    Args:
        directory: the checkpoint directory.
        step: number of updates done.
        tensors: file name to tensors by name.
        state: JSON-able values.
        keep: number of checkpoints to keep, this one included.

    Raises:
        TrainingError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    from safetensors.torch import save_file

    final, partial = directory / f"{_PREFIX}{step:08d}", directory / f"{PARTIAL}{step:08d}"
    try:
        with reporting_write_errors(directory, f"the checkpoint of step {step} cannot be written"):
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(f"{PARTIAL}*"):
                _remove(leftover)
            partial.mkdir()
            files = {}
            for name, values in tensors.items():
                path = partial / f"{name}.safetensors"
                save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, path)
                sync([path])
                files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
            manifest = partial / MANIFEST
            manifest.write_text(json.dumps({"step": step, "files": files, "state": dict(state)}), encoding="utf-8")
            sync([manifest])
            _remove(final)
            partial.rename(final)
            sync([directory])
    except TrainingError:
        _remove(partial)
        raise
    discard_after(directory, step)
    for old in _by_age(directory)[:-keep]:
        _remove(old)
    return final


def discard_after(directory: Path, step: int) -> None:
    """Remove checkpoints of later steps, which a run resumed from `step` no longer needs."""
    for path in _by_age(directory):
        if path.name > f"{_PREFIX}{step:08d}":
            _remove(path)


def newest_checkpoint(directory: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones are renamed with a warning.

    Raises:
        TrainingError: one cannot be read, which does not mean that it is damaged.
    """
    for path in reversed(_by_age(directory)):
        try:
            return open_checkpoint(path)
        except UsageError as fault:
            warn(f"{fault.where}: {fault.what}; renamed; looking for an earlier one")
            aside = path.with_name(f"damaged-{path.name}")
            _remove(aside)
            path.rename(aside)
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint.

    Raises:
        UsageError: it is damaged, incomplete or no checkpoint.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        step, state, files = int(manifest["step"]), dict(manifest["state"]), dict(manifest["files"])
        if not files:
            raise UsageError("damaged checkpoint: it is empty", where=str(path))
        for name, entry in files.items():
            file = path / name
            if file.stat().st_size != entry["size"] or sha256(file) != entry["sha256"]:
                raise UsageError(f"damaged checkpoint: {name} has changed", where=str(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as fault:
        raise UsageError("not a checkpoint, or damaged", where=str(path)) from fault
    except OSError as fault:
        raise TrainingError(f"the checkpoint cannot be read: {fault.strerror}", where=str(path)) from fault
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as fault:
        raise UsageError("not a checkpoint, or damaged", where=str(path)) from fault
    return Checkpoint(path, step, state)


def _by_age(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.name.startswith(_PREFIX))


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
