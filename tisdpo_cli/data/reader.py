"""Finds the files of a dataset and reads them by their format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tisdpo_cli.data.hub import fetch_splits
from tisdpo_cli.data.parsers import PARSERS, read_saved
from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.data.source import Source
from tisdpo_cli.data.stdin import STDIN, is_stdin, spooled_stdin
from tisdpo_cli.errors import DataError, UsageError, naming_out_of_memory
from tisdpo_cli.files import is_unfinished, matching_files, near_matches
from tisdpo_cli.formats import COMPRESSED, FORMAT_NAMES, FORMAT_OF_SUFFIX, format_of

SPLITS = ("train", "test")
# What others call the split that is evaluated, in the order of preference behind `test`.
_OTHER_TEST_NAMES = ("validation", "valid", "val", "dev", "eval")


class SplitFiles(dict[str, Path]):
    """Split name to its file, with what the user should know of the choice."""

    def __init__(self, files: Iterable[tuple[str, Path]], notices: Iterable[str] = ()) -> None:
        super().__init__(files)
        self.notices = list(notices)


def find_splits(dataset: str) -> SplitFiles:
    """Find the file of each split of a dataset.

    A file is the split `train`, so are the files of a glob (in sorted order) and stdin (`-`). A directory holds
    `train.*` and optionally `test.*` (or `validation.*` and its like), or directories written by `save_to_disk`, or is
    one itself. `owner/name` is fetched from the hub.

    Raises:
        UsageError: the path does not exist, and the hub has no such dataset.
        DataError: the path is not a dataset.
    """
    if dataset == STDIN:
        return SplitFiles([("train", spooled_stdin())])
    path = Path(dataset).expanduser()
    if path.is_file():
        _check_suffix(path, dataset)
        return SplitFiles([("train", path)])
    if path.is_dir():
        return _splits_of_directory(path, dataset)
    if any(mark in dataset for mark in "*?["):
        files = matching_files(path)
        if not files:
            raise UsageError("no file matches", where=f"--dataset {dataset}")
        for file in files:
            _check_suffix(file, str(file))
        return SplitFiles([("train", path)])
    fetched = fetch_splits(dataset, (*SPLITS, *_OTHER_TEST_NAMES), near_matches(path))
    return _choose_splits(fetched, dataset)


def _check_suffix(path: Path, shown: str) -> None:
    if path.suffix and format_of(path.name) is None:
        what, fix = f"unsupported file type {path.suffix}", f"convert it to {FORMAT_NAMES}"
        if path.suffix.lower() == COMPRESSED:
            what = f"unsupported file type {''.join(path.suffixes[-2:])}"
            fix = "decompress it; .jsonl.gz, .json.gz and .csv.gz are read as they are"
        raise DataError(what, where=shown, fix=fix)


def _splits_of_directory(path: Path, dataset: str) -> SplitFiles:
    if is_unfinished(path):
        raise DataError("incomplete output", where=dataset, fix="rerun the command that created it to resume")
    if _is_saved(path):
        return SplitFiles([("train", path)])
    names = (*SPLITS, *_OTHER_TEST_NAMES)
    files = {name: file for name in names if (file := _split_file(path, name)) is not None}
    if "train" not in files:
        raise DataError("no train file in this directory", where=dataset, fix=_dataset_hint(path))
    return _choose_splits(files, dataset)


def _choose_splits(files: dict[str, Path], dataset: str) -> SplitFiles:
    """The train split, and as the test split the first of the names for it."""
    tests = [name for name in ("test", *_OTHER_TEST_NAMES) if name in files]
    chosen = [("train", files["train"]), *(("test", files[name]) for name in tests[:1])]
    if not tests or tests == ["test"]:
        return SplitFiles(chosen)
    used, *unused = (files[name].name for name in tests)
    notice = f"{dataset}: {used} is the test split" + (f"; {' and '.join(unused)} not used" if unused else "")
    return SplitFiles(chosen, [notice])


def _split_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a directory.

    Raises:
        DataError: there are several.
    """
    names = [f"{split}{suffix}{end}" for suffix in FORMAT_OF_SUFFIX for end in ("", COMPRESSED)]
    files = [file for name in names if format_of(name) and (file := folder / name).is_file()]
    files += [saved for saved in (folder / split,) if _is_saved(saved)]
    if len(files) > 1:
        names = [file.name for file in files]
        fix = "keep one of them, or give the path of the file"
        raise DataError(f"has {' and '.join(names)}", where=str(folder), fix=fix)
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
    hint = f"a dataset is a file ({FORMAT_NAMES}) or a directory with train.* and optionally test.* ({suffixes})"
    endings = sorted({inner.suffix for inner in folder.iterdir() if inner.is_file() and format_of(inner.name)})
    return f"{hint}, or a glob such as '{folder}/*{endings[0]}'" if endings else hint


def read_rows(path: Path, notices: list[str] | None = None) -> Iterator[Row | BadRow]:
    """Read the rows of a split in order; invalid ones come as a `BadRow`. A file without a suffix holds JSON.

    Args:
        path: file, saved dataset or glob.
        notices: receives what was recognized about the files.

    Raises:
        DataError: the whole file is unreadable.
    """
    notices = notices if notices is not None else []
    for file in matching_files(path) or [path]:
        parse = read_saved if file.is_dir() else PARSERS[format_of(file.name) or "JSON"]
        with naming_out_of_memory("reading", shown_path(file)):
            yield from parse(Source(file, shown_path(file)), notices)


def shown_path(path: Path) -> str:
    """Return the name of a file in messages."""
    return "stdin" if is_stdin(path) else str(path)
