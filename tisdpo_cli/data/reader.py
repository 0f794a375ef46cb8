"""Finds the files of a dataset and reads them by their format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tisdpo_cli.data.hub import fetch_splits
from tisdpo_cli.data.parsers import PARSERS, read_saved
from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.errors import DataError
from tisdpo_cli.files import is_unfinished, near_matches
from tisdpo_cli.formats import FORMAT_NAMES, FORMAT_OF_SUFFIX

SPLITS = ("train", "test")


def find_splits(dataset: str) -> dict[str, Path]:
    """Find the file of each split of a dataset.

    A file is the split `train`. A directory holds `train.*` and optionally `test.*`, or directories written by
    `save_to_disk`, or is one itself. `owner/name` is fetched from the hub.

    Raises:
        UsageError: the path does not exist, and the hub has no such dataset.
        DataError: the path is not a dataset.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        if path.suffix and path.suffix.lower() not in FORMAT_OF_SUFFIX:
            fix = f"convert it to {FORMAT_NAMES}"
            raise DataError(f"unsupported file type {path.suffix}", where=dataset, fix=fix)
        return {"train": path}
    if path.is_dir():
        if is_unfinished(path):
            fix = "rerun the command that created it to resume"
            raise DataError("incomplete output", where=dataset, fix=fix)
        if _is_saved(path):
            return {"train": path}
        files = {split: file for split in SPLITS if (file := _split_file(path, split)) is not None}
        if "train" not in files:
            raise DataError("no train file in this directory", where=dataset, fix=_dataset_hint(path))
        return files
    return fetch_splits(dataset, SPLITS, near_matches(path))


def _split_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a directory.

    Raises:
        DataError: there are several.
    """
    files = [file for suffix in FORMAT_OF_SUFFIX if (file := folder / f"{split}{suffix}").is_file()]
    files += [saved for saved in (folder / split,) if _is_saved(saved)]
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise DataError(f"has {names}", where=str(folder), fix="keep one of them, or give the path of the file")
    return files[0] if files else None


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this directory, for one split."""
    return all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))


def _dataset_hint(folder: Path) -> str:
    """What to do about a directory that is no dataset; it may contain several."""
    datasets = sorted(inner for inner in folder.glob("*") if inner.is_dir() and any(inner.glob("train.*")))
    if datasets:
        return f"it contains several datasets; choose one of {', '.join(map(str, datasets[:4]))}"
    suffixes = ", ".join(FORMAT_OF_SUFFIX)
    return f"a dataset is a file ({FORMAT_NAMES}) or a directory with train.* and optionally test.* ({suffixes})"


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """Read the rows of a split in order; invalid ones come as a `BadRow`. A file without a suffix holds JSON.

    Raises:
        DataError: the whole file is unreadable.
    """
    return read_saved(path) if path.is_dir() else PARSERS[FORMAT_OF_SUFFIX.get(path.suffix.lower(), "JSON")](path)
