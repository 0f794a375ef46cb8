"""Downloads datasets from the hub once, and caches them as JSON Lines, so that one reader checks every row."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tisdpo_cli.errors import DataError, UsageError, is_out_of_memory
from tisdpo_cli.files import cache_directory, replacing

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_TIMEOUT_SECONDS = 1.5
# Names the splits that the hub has; the cache holds those that were asked for.
_SPLITS_FILE = "splits.json"


def fetch_splits(name: str, near: str) -> tuple[list[str], Callable[[str], Path]]:
    """Find the splits of a hub dataset.

    Args:
        name: `owner/name`.
        near: suggestion for a path that looks mistyped, or nothing.

    Returns:
        The names of the splits, and a function that returns the JSONL file of one and downloads it if need be.

    Raises:
        UsageError: the name is not a hub id, or the hub does not have it or cannot be reached.
        DataError: it cannot be downloaded.
    """
    where = f"--dataset {name}"
    if near or not _HUB_ID.match(name) or Path(name.split("/")[0]).is_dir():
        raise UsageError(f"no such file or directory{near}", where=where)
    folder = cache_directory() / "datasets" / name.replace("/", "__")
    import huggingface_hub

    try:
        revision = huggingface_hub.HfApi().dataset_info(name, timeout=_TIMEOUT_SECONDS).sha
    except Exception as error:
        cached = sorted(folder.glob("*/[!.]*.jsonl"), key=lambda path: path.stat().st_mtime)
        if cached:
            return _cached_splits(cached[-1].parent, name)
        reason = f"hub: {type(error).__name__}"
        raise UsageError(
            f"no such file or directory, and no dataset to download by this name ({reason})", where=where
        ) from error
    return _splits_of_revision(folder / str(revision), name, revision)


def _cached_splits(folder: Path, name: str) -> tuple[list[str], Callable[[str], Path]]:
    """The splits of a cached revision, while the hub cannot be reached."""
    cached = sorted(file.stem for file in folder.glob("[!.]*.jsonl"))
    names = _recorded_names(folder) or cached

    def locate(split: str) -> Path:
        if split not in cached:
            what = f"split {split!r} is not cached, and the hub cannot be reached"
            raise UsageError(what, where=f"--dataset {name}")
        return folder / f"{split}.jsonl"

    return names, locate


def _splits_of_revision(folder: Path, name: str, revision: str | None) -> tuple[list[str], Callable[[str], Path]]:
    loaded: dict[str, Mapping[str, Any]] = {}

    def load() -> Mapping[str, Any]:
        if not loaded:
            loaded[name] = _download(name, revision)
        return loaded[name]

    def locate(split: str) -> Path:
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            _write((json.dumps(row, ensure_ascii=False, default=str) for row in load()[split]), file)
        return file

    names = _recorded_names(folder)
    if names is None:
        names = list(load())
        _write([json.dumps({"splits": names})], folder / _SPLITS_FILE)
    return names, locate


def _recorded_names(folder: Path) -> list[str] | None:
    try:
        return list(json.loads((folder / _SPLITS_FILE).read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _download(name: str, revision: str | None) -> Mapping[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, revision=revision)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot be downloaded: {reason[:160]}", where=f"--dataset {name}") from error


def _write(lines: Iterable[str], path: Path) -> None:
    """Write a file of the cache. Several processes may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, f"{os.getpid()}-") as partial, partial.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
