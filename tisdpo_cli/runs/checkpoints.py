"""Checkpoints: whole or absent, verified before use. Tensors in safetensors, the rest in JSON; no pickle.

A checkpoint is a directory `step-00000120` with its tensor files and a manifest of their sizes and hashes. The manifest
ends with a hash of itself, and the name of the directory repeats the step: one flipped bit anywhere is found. A
checkpoint is written under another name and appears by one rename, so that a kill at any moment leaves the one before.

Each process writes its rows of a model that is split over processes, and a run on any number of them can read these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tisdpo_cli.errors import TrainingError, UsageError
from tisdpo_cli.files import PARTIAL, remove, remove_partials, replacing, reporting_write_errors, sha256, sync

if TYPE_CHECKING:
    from torch import Tensor

    from tisdpo_cli.runs.runtime import Runtime

MANIFEST = "checkpoint.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        step: number of updates done.
        state: the JSON values saved with the tensors.
        shapes: of tensors that are split by rows over several files: group of tensors to name to global shape.
        world: number of files of a group.
    """

    path: Path
    step: int
    state: dict[str, Any]
    shapes: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    world: int = 1

    def files(self, name: str) -> list[Path]:
        """The files of one group, in the order of the processes that wrote them."""
        return [self.path / _file(name, rank, self.world) for rank in range(self.world)]


@dataclass(frozen=True)
class Shard:
    """What one process writes of a group of tensors.

    Attributes:
        tensors: its rows of what is split, and on the first process all that is not.
        shapes: global shapes of what is split.
    """

    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, Sequence[int]]


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    spared: int | None = None,
) -> Path:
    """Write a checkpoint and remove older ones.

    Args:
        directory: the checkpoint directory.
        step: number of updates done.
        tensors: file name to tensors by name.
        state: JSON-able values.
        keep: number of checkpoints to keep, this one included.
        spared: step of a checkpoint that is kept besides.

    Raises:
        TrainingError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    partial = _partial(directory, step)
    try:
        with _writing(directory, step):
            _prepare(directory, partial)
            files = _write(partial, tensors, 0, 1)
            _finish(partial, directory, step, _manifest(step, files, state))
    except BaseException:
        _discard(partial)
        raise
    _prune(directory, step, keep, spared)
    return directory / _name(step)


def save_shards(
    runtime: Runtime,
    directory: Path,
    step: int,
    shards: Mapping[str, Shard],
    state: Mapping[str, Any],
    keep: int,
    spared: int | None = None,
) -> None:
    """Write a checkpoint with one file from each process for every group of tensors.

    Raises:
        TrainingError: see `save_checkpoint`, on any process.
    """
    partial = _partial(directory, step)
    tensors = {name: shard.tensors for name, shard in shards.items()}
    shapes = {name: dict(shard.shapes) for name, shard in shards.items()}

    def prepare() -> None:
        with _writing(directory, step):
            _prepare(directory, partial)

    def write() -> list[dict[str, Any]]:
        with _writing(directory, step):
            return [_write(partial, tensors, runtime.rank, runtime.world)]

    def finish() -> None:
        with _writing(directory, step):
            _finish(partial, directory, step, _manifest(step, files, state, shapes, runtime.world))

    try:
        runtime.on_main(prepare)
        files = {name: entry for written in runtime.on_all(write) for name, entry in written.items()}
        runtime.on_main(finish)
    except BaseException:
        if runtime.main:
            _discard(partial)
        raise
    runtime.on_main(lambda: _prune(directory, step, keep, spared))


def _partial(directory: Path, step: int) -> Path:
    """Where a checkpoint is written before it appears."""
    return directory / f"{PARTIAL}{step:08d}"


def _writing(directory: Path, step: int) -> AbstractContextManager[None]:
    return reporting_write_errors(directory, f"the checkpoint of step {step} cannot be written")


def _prepare(directory: Path, partial: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    remove_partials(directory)
    partial.mkdir()


def _finish(partial: Path, directory: Path, step: int, manifest: str) -> None:
    """Let a checkpoint appear, whose tensor files are written."""
    with replacing(partial / MANIFEST) as new:
        new.write_text(manifest, encoding="utf-8", newline="\n")
    final = directory / _name(step)
    remove(final)
    partial.rename(final)
    sync([directory])


def _prune(directory: Path, step: int, keep: int, spared: int | None) -> None:
    discard_after(directory, step)
    for old in _by_age(directory)[:-keep]:
        if spared is None or old.name != _name(spared):
            _discard(old)


def checkpoint_of(directories: Sequence[Path | None], step: int) -> Path | None:
    """The checkpoint of a step in the first of some directories that has one; None if there is none."""
    places = [directory / _name(step) for directory in directories if directory is not None]
    return next((place for place in places if place.is_dir()), None)


def _file(name: str, rank: int, world: int) -> str:
    return f"{name}.safetensors" if world == 1 else f"{name}-{rank + 1:05d}-of-{world:05d}.safetensors"


def _write(partial: Path, tensors: Mapping[str, Mapping[str, Tensor]], rank: int, world: int) -> dict[str, Any]:
    """Write the files of one process; returns their entries in the manifest."""
    from safetensors.torch import save_file

    files = {}
    for name, values in tensors.items():
        path = partial / _file(name, rank, world)
        with replacing(path) as new:
            save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, new)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    return files


def _manifest(
    step: int,
    files: Mapping[str, Any],
    state: Mapping[str, Any],
    shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    world: int = 1,
) -> str:
    """The text of a manifest; there is no other text with the same values."""
    content: dict[str, Any] = {"step": step, "files": dict(files), "state": dict(state)}
    if world > 1:
        content |= {"world": world, "shapes": shapes}
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
        world, shapes = int(manifest.get("world", 1)), dict(manifest.get("shapes", {}))
        fault = _fault_of_manifest(path, text, manifest, shapes, world) or _fault_of_files(path, files)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UsageError("not a checkpoint, or damaged", where=str(path)) from error
    except OSError as error:
        raise TrainingError(f"the checkpoint cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError("not a checkpoint, or damaged", where=str(path)) from error
    if fault is not None:
        raise UsageError(f"damaged checkpoint: {fault}", where=str(path))
    return Checkpoint(path, step, state, shapes, world)


def _fault_of_manifest(
    path: Path, text: str, manifest: Mapping[str, Any], shapes: Mapping[str, Any], world: int
) -> str | None:
    if "sha256" not in manifest:
        return f"{MANIFEST} has no hash of itself (an earlier version wrote it)"
    step = manifest["step"]
    if text != _manifest(step, manifest["files"], manifest["state"], shapes, world):
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
