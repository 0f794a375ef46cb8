"""Finds the splits of a dataset: in a file, a directory, a glob, on stdin or on the hub. Knows no rows."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tisdpo_cli.data.hub import fetch_splits
from tisdpo_cli.data.stdin import STDIN, spooled_stdin
from tisdpo_cli.errors import DataError, UsageError
from tisdpo_cli.files import is_unfinished, matching_files, near_matches
from tisdpo_cli.formats import COMPRESSED, FORMAT_NAMES, FORMAT_OF_SUFFIX, format_of

TRAIN, TEST = "train", "test"
# What the split that is evaluated is called, in the order of preference.
_TEST_NAMES = (TEST, "validation", "valid", "val", "dev", "eval")
# Such as train-00000-of-00002.parquet, also with a hash at the end.
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]{16})?")
# Where `hf download` leaves the shards of a dataset.
_SHARD_FOLDER = "data"


class FoundSplits(Mapping[str, Path]):
    """The splits of a dataset: name to its file, saved dataset, or glob of files.

    A split is looked at when it is asked for: a fault of one that nobody uses is no fault.
    """

    def __init__(self, names: Iterable[str], locate: Callable[[str], Path]) -> None:
        self._names, self._locate = list(names), locate

    def __getitem__(self, name: str) -> Path:
        if name not in self._names:
            raise KeyError(name)
        return self._locate(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class SplitFiles(dict[str, Path]):
    """The splits in use, `train` and perhaps `test`, with what the user should know of the choice."""

    def __init__(self, files: Iterable[tuple[str, Path]], notices: Iterable[str] = ()) -> None:
        super().__init__(files)
        self.notices = list(notices)


def find_splits(dataset: str) -> Mapping[str, Path]:
    """Find all splits of a dataset.

    A file is the split `train`, so are the files of a glob (in sorted order) and stdin (`-`). A directory holds a file
    `NAME.*` for each split, or its shards, or directories written by `save_to_disk`, or is one itself. `owner/name` is
    fetched from the hub.

    Raises:
        UsageError: the path does not exist, and the hub has no such dataset.
        DataError: the path is not a dataset.
    """
    if dataset == STDIN:
        return {TRAIN: spooled_stdin()}
    path = Path(dataset).expanduser()
    if path.is_file():
        _check_suffix(path, dataset)
        return {TRAIN: path}
    if path.is_dir():
        return _splits_of_directory(path, dataset)
    if any(mark in dataset for mark in "*?["):
        files = matching_files(path)
        if not files:
            raise UsageError("no file matches", where=f"--dataset {dataset}")
        for file in files:
            _check_suffix(file, str(file))
        return {TRAIN: path}
    names, locate = fetch_splits(dataset, near_matches(path))
    return FoundSplits(names, locate)


def training_splits(
    dataset: str, split: str = TRAIN, eval_split: str | None = None, hold_out: bool = False
) -> SplitFiles:
    """Choose the splits of a training.

    Args:
        dataset: as given.
        split: the one to train on.
        eval_split: the one to evaluate on; `test`, or else `validation` or its like where None.
        hold_out: whether rows of the training split are held out to evaluate on.

    Raises:
        UsageError: there is no such dataset or split, or rows are held out beside a test split.
        DataError: the path is not a dataset.
    """
    found = find_splits(dataset)
    train = named_split(found, split, dataset, "--split")
    if eval_split is not None:
        return SplitFiles([(TRAIN, train), (TEST, named_split(found, eval_split, dataset, "--eval-split"))])
    # Beside train_prefs, test_prefs comes before test.
    own = [split.replace(TRAIN, name, 1) for name in _TEST_NAMES] if TRAIN in split else []
    tests = [name for name in dict.fromkeys([*own, *_TEST_NAMES]) if name in found and name != split]
    if hold_out and tests:
        what = f"the dataset has the split {tests[0]!r} to evaluate on"
        raise UsageError(what, where="--eval-size", fix="leave it out, or give --dataset the file of one split")
    if not tests:
        return SplitFiles([(TRAIN, train)])
    files = [(TRAIN, train), (TEST, found[tests[0]])]
    if tests == [TEST]:
        return SplitFiles(files)
    unused = f"; {' and '.join(found[name].name for name in tests[1:])} not used" if tests[1:] else ""
    return SplitFiles(files, [f"{dataset}: {files[1][1].name} is the test split{unused}"])


def test_split(found: Mapping[str, Path]) -> str | None:
    """The name of the split that is evaluated by default, or None."""
    return next((name for name in _TEST_NAMES if name in found), None)


def named_split(found: Mapping[str, Path], name: str, dataset: str, option: str) -> Path:
    """Return the file of a split.

    Raises:
        UsageError: there is no such split.
        DataError: it has several files, or the directory looks like no dataset.
    """
    if name not in found:
        folder = Path(dataset).expanduser()
        if name == TRAIN and folder.is_dir() and not any(map(_is_known, found)):
            raise DataError("no train file in this directory", where=dataset, fix=_dataset_hint(folder))
        raise UsageError(f"{dataset} has no split {name!r}; available: {', '.join(found)}", where=option)
    return found[name]


def _check_suffix(path: Path, shown: str) -> None:
    if path.suffix and format_of(path.name) is None:
        what, fix = f"unsupported file type {path.suffix}", f"convert it to {FORMAT_NAMES}"
        if path.suffix.lower() == COMPRESSED:
            what = f"unsupported file type {''.join(path.suffixes[-2:])}"
            fix = "decompress it; .jsonl.gz, .json.gz and .csv.gz are read as they are"
        raise DataError(what, where=shown, fix=fix)


# Directories -------------------------------------------------------------------------------------------------------


def _splits_of_directory(path: Path, dataset: str) -> Mapping[str, Path]:
    if is_unfinished(path):
        raise DataError("incomplete output", where=dataset, fix="rerun the command that created it to resume")
    if _is_saved(path):
        return {TRAIN: path}
    splits: dict[str, list[Path]] = {}
    for file in sorted([*path.iterdir(), *(path / _SHARD_FOLDER).glob("*-of-*")]):
        name = _split_name(file, shard_only=file.parent != path)
        # The shards of a split stand for one file.
        source = file if name is None or not _SHARD.fullmatch(_stem(file)) else _shards(file, name)
        if name is not None and source not in splits.setdefault(name, []):
            splits[name].append(source)

    def locate(name: str) -> Path:
        first, *others = splits[name]
        if others:
            named = " and ".join(source.name for source in splits[name])
            fix = "keep one of them, or give the path of the file"
            raise DataError(f"has {named}", where=str(path), fix=fix)
        _check_shards(first)
        return first

    in_order = sorted(splits, key=lambda name: (name != TRAIN, name != TEST, name))
    return FoundSplits(in_order, locate)


def _split_name(file: Path, shard_only: bool) -> str | None:
    """The split that a file or directory holds, or None if it is none.

    JSON files are splits if their names say so: there are many others.
    """
    if file.is_dir():
        return file.name if _is_saved(file) and not shard_only else None
    kind = format_of(file.name)
    if kind is None or not file.is_file() or file.name.startswith("."):
        return None
    stem = _stem(file)
    shard = _SHARD.fullmatch(stem)
    name = shard["split"] if shard else stem
    if shard_only and not shard:
        return None
    return name if kind != "JSON" or _is_known(name) else None


def _is_known(split: str) -> bool:
    """Whether a name says that it is one of a split, such as `train_prefs`."""
    return re.split(r"[^A-Za-z]", split)[0] in (TRAIN, *_TEST_NAMES)


def _stem(file: Path) -> str:
    """The name of a file without the suffixes of its format."""
    name = file.name[: -len(COMPRESSED)] if file.name.lower().endswith(COMPRESSED) else file.name
    suffix = next((suffix for suffix in FORMAT_OF_SUFFIX if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _shards(file: Path, split: str) -> Path:
    """The glob that matches a shard and its neighbours."""
    ending = file.name[len(_stem(file)) :]
    number = "?" * 5
    return Path(glob.escape(str(file.parent))) / f"{glob.escape(split)}-{number}-of-{number}*{ending}"


def _check_shards(path: Path) -> None:
    """Check that the shards of a split are all there.

    Raises:
        DataError: some are missing, or there are those of several versions.
    """
    files = matching_files(path)
    shards = [(int(match["number"]), int(match["count"])) for f in files if (match := _SHARD.fullmatch(_stem(f)))]
    if files and shards != [(number, len(files)) for number in range(len(files))]:
        what = f"shards are missing or left over: {len(files)} are there, beginning with {files[0].name}"
        raise DataError(what, where=str(files[0].parent), fix="download the dataset again, or give a glob")


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this directory, for one split."""
    return all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))


def _dataset_hint(folder: Path) -> str:
    """What to do about a directory that is no dataset; it may contain several."""
    datasets = sorted(inner for inner in folder.glob("*") if inner.is_dir() and any(inner.glob("train[.-]*")))
    if datasets:
        return f"it contains several datasets; choose one of {', '.join(map(str, datasets[:4]))}"
    suffixes = ", ".join(FORMAT_OF_SUFFIX)
    hint = f"a dataset is a file ({FORMAT_NAMES}) or a directory with train.* and optionally test.* ({suffixes})"
    endings = sorted({inner.suffix for inner in folder.iterdir() if inner.is_file() and format_of(inner.name)})
    return f"{hint}, or a glob such as '{folder}/*{endings[0]}'" if endings else hint
