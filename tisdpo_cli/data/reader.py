"""Finds the files of a dataset, and reads them by their format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tisdpo_cli.data.formats import read_csv, read_json, read_parquet, read_saved
from tisdpo_cli.data.hub import fetch_splits
from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.errors import DataError
from tisdpo_cli.files import is_unfinished, near_matches

SPLITS = ("train", "test")
# By suffix; a file without one holds JSON.
_READERS: Mapping[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
_FORMATS = "JSONL, JSON, CSV or Parquet"


def find_splits(dataset: str) -> dict[str, Path]:
    """The file of each split of a dataset: a file is `train`; a directory holds `train.*` and maybe `test.*`, or what
    `save_to_disk` wrote, which are directories themselves; `response_ids/name` is fetched from the hub.

    Raises:
        UsageFault: there is nothing at the path, and the hub has no such dataset.
        DataError: what is there is no dataset.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        if path.suffix and path.suffix.lower() not in _READERS:
            raise DataError(f"files of type {path.suffix} are not read", where=dataset, fix=f"make it {_FORMATS}")
        return {"train": path}
    if path.is_dir():
        if is_unfinished(path):
            fix = "run the command that makes it again; it goes on"
            raise DataError("this output is not finished", where=dataset, fix=fix)
        if _is_saved(path):
            return {"train": path}
        found = {split: file for split in SPLITS if (file := _file_of(path, split)) is not None}
        if "train" not in found:
            raise DataError("no train.jsonl in this directory", where=dataset, fix=_what_a_dataset_is(path))
        return found
    return fetch_splits(dataset, SPLITS, near_matches(path))


def _file_of(folder: Path, split: str) -> Path | None:
    """The file of a split in a directory.

    Raises:
        DataError: there are several.
    """
    found = [file for suffix in _READERS if (file := folder / f"{split}{suffix}").is_file()]
    found += [saved for saved in (folder / split,) if _is_saved(saved)]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise DataError(f"has {names}", where=str(folder), fix="leave one of them, or name the file itself")
    return found[0] if found else None


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this directory, for one split."""
    return all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))


def _what_a_dataset_is(folder: Path) -> str:
    """What to do about a directory that is none; it may hold several."""
    inside = sorted(inner for inner in folder.glob("*") if inner.is_dir() and any(inner.glob("train.*")))
    if inside:
        return f"it holds several datasets; name one of them: {', '.join(map(str, inside[:4]))}"
    return (
        f"a dataset is a file ({_FORMATS}), or a directory with train.jsonl (or .json, .csv, .parquet) and maybe a test"
    )


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a file in order; one that cannot be used comes as a `BadRow`.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    return read_saved(path) if path.is_dir() else _READERS.get(path.suffix.lower(), read_json)(path)
