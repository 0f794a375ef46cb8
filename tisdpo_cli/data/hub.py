"""Downloads datasets from the hub once, and caches them as JSON Lines, so that one reader checks every row."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from tisdpo_cli.errors import DataError, UsageError, is_out_of_memory
from tisdpo_cli.files import PARTIAL, cache_directory

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_TIMEOUT_SECONDS = 1.5


def fetch_splits(name: str, splits: tuple[str, ...], near: str) -> dict[str, Path]:
    """Return the splits of a hub dataset as JSONL files in the cache.

    Args:
        name: `owner/name`.
        splits: splits to download, of which `train` is required.
        near: suggestion for a path that looks mistyped, or nothing.

    Raises:
        UsageError: the name is not a hub id, or the hub does not have it or cannot be reached.
        DataError: the dataset has no train split.
    """
    where = f"--dataset {name}"
    if near or not _HUB_ID.match(name) or Path(name.split("/")[0]).is_dir():
        raise UsageError(f"no such file or directory{near}", where=where)
    folder = cache_directory() / "datasets" / name.replace("/", "__")
    import huggingface_hub

    try:
        revision = huggingface_hub.HfApi().dataset_info(name, timeout=_TIMEOUT_SECONDS).sha
    except Exception as error:
        cached = sorted(folder.glob("*/train.jsonl"), key=lambda path: path.stat().st_mtime)
        if cached:
            return _cached_splits(cached[-1].parent, splits)
        reason = f"hub: {type(error).__name__}"
        raise UsageError(
            f"no such file or directory, and no dataset to download by this name ({reason})", where=where
        ) from error
    folder = folder / str(revision)
    if not (folder / "train.jsonl").is_file():
        _download(name, revision, folder, splits)
    return _cached_splits(folder, splits)


def _download(name: str, revision: str | None, folder: Path, splits: tuple[str, ...]) -> None:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot be downloaded: {reason[:160]}", where=f"--dataset {name}") from error
    if "train" not in loaded:
        raise DataError(f"has no train split (it has {', '.join(loaded)})", where=f"--dataset {name}")
    folder.mkdir(parents=True, exist_ok=True)
    # The train split is written last, as the marker of a complete download. Several processes may download at once.
    for split in sorted(set(splits) & set(loaded), key=lambda s: s == "train"):
        partial = folder / f"{PARTIAL}{os.getpid()}-{split}.jsonl"
        with partial.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in loaded[split])
        partial.replace(folder / f"{split}.jsonl")


def _cached_splits(folder: Path, splits: tuple[str, ...]) -> dict[str, Path]:
    return {split: folder / f"{split}.jsonl" for split in splits if (folder / f"{split}.jsonl").is_file()}
