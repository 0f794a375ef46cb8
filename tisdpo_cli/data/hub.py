"""Datasets of the hub, by `datasets`: fetched once and kept as JSON Lines, so that one reader checks every row."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from tisdpo_cli.errors import DataError, UsageError
from tisdpo_cli.files import PARTIAL, cache_directory

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_TIMEOUT_SECONDS = 1.5


def fetch_splits(name: str, splits: tuple[str, ...], near: str) -> dict[str, Path]:
    """The splits of a dataset of the hub, as JSONL files in the cache.

    Args:
        name: `response_ids/name`.
        splits: the splits that are of use.
        near: what to say where the name is no hub id, because it looks like a mistyped path.

    Raises:
        UsageError: the name is no hub id, or the hub does not have it or cannot be reached.
        DataError: the dataset has none of the splits.
    """
    where = f"--dataset {name}"
    if near or not _HUB_ID.match(name) or Path(name.split("/")[0]).is_dir():
        raise UsageError(f"no such file or directory{near}", where=where)
    home = cache_directory() / "datasets" / name.replace("/", "__")
    import huggingface_hub

    try:
        revision = huggingface_hub.HfApi().dataset_info(name, timeout=_TIMEOUT_SECONDS).sha
    except Exception as fault:
        kept = sorted(home.glob("*/train.jsonl"), key=lambda path: path.stat().st_mtime)
        if kept:
            return _kept(kept[-1].parent, splits)
        reason = f"the hub says: {type(fault).__name__}"
        raise UsageError(
            f"no such file or directory, and no dataset that can be fetched ({reason})", where=where
        ) from fault
    folder = home / str(revision)
    if not (folder / "train.jsonl").is_file():
        _fetch(name, revision, folder, splits)
    return _kept(folder, splits)


def _fetch(name: str, revision: str | None, folder: Path, splits: tuple[str, ...]) -> None:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as fault:
        first = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise DataError(f"cannot be fetched: {first[:160]}", where=f"--dataset {name}") from fault
    if "train" not in loaded:
        raise DataError(f"has no split train (it has {', '.join(loaded)})", where=f"--dataset {name}")
    folder.mkdir(parents=True, exist_ok=True)
    # The train split appears last: it is what says that the others are there. Several processes may fetch at once.
    for split in sorted(set(splits) & set(loaded), key=lambda s: s == "train"):
        partial = folder / f"{PARTIAL}{os.getpid()}-{split}.jsonl"
        with partial.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in loaded[split])
        partial.replace(folder / f"{split}.jsonl")


def _kept(folder: Path, splits: tuple[str, ...]) -> dict[str, Path]:
    return {split: folder / f"{split}.jsonl" for split in splits if (folder / f"{split}.jsonl").is_file()}
