"""Checkpoints: whole or absent, verified before use. Tensors in safetensors, the rest in JSON; no pickle.

A checkpoint is a directory `step-00000120` with its tensor files and a manifest of their sizes and hashes. The manifest
ends with a hash of itself, and the name of the directory repeats the step: one flipped bit anywhere is found. A
checkpoint is written under another name and appears by one rename, so that a kill at any moment leaves the one before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tisdpo_cli.errors import TrainingError, UsageError
from tisdpo_cli.files import PARTIAL, remove, remove_partials, replacing, reporting_write_errors, sha256, sync

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
    final, partial = directory / _name(step), directory / f"{PARTIAL}{step:08d}"
    try:
        with reporting_write_errors(directory, f"the checkpoint of step {step} cannot be written"):
            directory.mkdir(parents=True, exist_ok=True)
            remove_partials(directory)
            partial.mkdir()
            _write(partial, step, tensors, state)
            remove(final)
            partial.rename(final)
            sync([directory])
    except BaseException:
        _discard(partial)
        raise
    discard_after(directory, step)
    for old in _by_age(directory)[:-keep]:
        _discard(old)
    return final


def _write(partial: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    files = {}
    for name, values in tensors.items():
        path = partial / f"{name}.safetensors"
        with replacing(path) as new:
            save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, new)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    with replacing(partial / MANIFEST) as new:
        new.write_text(_manifest(step, files, state), encoding="utf-8")


def _manifest(step: int, files: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """The text of a manifest; there is no other text with the same values."""
    content = {"step": step, "files": dict(files), "state": dict(state)}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest})


def discard_after(directory: Path, step: int) -> None:
    """Remove checkpoints of later steps, which a run resumed from `step` no longer needs."""
    for path in _by_age(directory):
        if path.name > _name(step):
            _discard(path)


def newest_checkpoint(directory: Path, warn: Callable[[str], None], last_step: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; others are renamed with a warning.

    Args:
        directory: the checkpoint directory.
        warn: called for each checkpoint that cannot be used.
        last_step: number of updates of the run, or None if unknown; a later checkpoint is none of this run.

    Raises:
        TrainingError: one cannot be read, which does not mean that it is damaged.
    """
    for path in reversed(_by_age(directory)):
        try:
            checkpoint = open_checkpoint(path)
            if last_step is not None and checkpoint.step > last_step:
                raise UsageError(f"beyond the {last_step} steps of this run", where=str(path))
            return checkpoint
        except UsageError as fault:
            warn(f"{fault.where}: {fault.what}; renamed; looking for an earlier one")
            aside = path.with_name(f"damaged-{path.name}")
            remove(aside)
            path.rename(aside)
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint.

    Raises:
        UsageError: it is damaged, incomplete or no checkpoint.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        step, state, files = int(manifest["step"]), dict(manifest["state"]), dict(manifest["files"])
        fault = _fault_of_manifest(path, text, manifest) or _fault_of_files(path, files)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UsageError("not a checkpoint, or damaged", where=str(path)) from error
    except OSError as error:
        raise TrainingError(f"the checkpoint cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError("not a checkpoint, or damaged", where=str(path)) from error
    if fault is not None:
        raise UsageError(f"damaged checkpoint: {fault}", where=str(path))
    return Checkpoint(path, step, state)


def _fault_of_manifest(path: Path, text: str, manifest: Mapping[str, Any]) -> str | None:
    if "sha256" not in manifest:
        return f"{MANIFEST} has no hash of itself (an earlier version wrote it)"
    step = manifest["step"]
    if text != _manifest(step, manifest["files"], manifest["state"]):
        return f"{MANIFEST} has changed"
    name = path.resolve().name
    # A copy may have any name that does not say another step.
    if name.startswith(_PREFIX) and name != _name(step):
        return f"it holds step {step}"
    return None


def _fault_of_files(path: Path, files: Mapping[str, Any]) -> str | None:
    if not files:
        return "it is empty"
    for name, entry in files.items():
        file = path / name
        if Path(name).name != name or file.stat().st_size != entry["size"] or sha256(file) != entry["sha256"]:
            return f"{name} has changed"
    return None


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def _by_age(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.name.startswith(_PREFIX))


def _discard(path: Path) -> None:
    """Remove what is no longer needed; it may stay if it cannot be removed."""
    with suppress(OSError):
        remove(path)
