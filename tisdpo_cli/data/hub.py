"""Downloads datasets from the hub once, and caches them as JSON Lines, so that one reader checks every row."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tisdpo_cli.errors import DataError, UsageError, is_out_of_memory
from tisdpo_cli.files import cache_directory, replacing

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:@/\s]+))?(@(?P<revision>[^:@\s]+))?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
_TIMEOUT_SECONDS = 1.5
# Names the splits that the hub has; the cache holds those that were asked for.
_SPLITS_FILE = "splits.json"
# The directory of the cache with the commit of each revision that was asked for, as of the last contact.
_REFS = "refs"

# Gives the JSONL file of a split.
Locate = Callable[[str], Path]


@dataclass(frozen=True)
class _HubDataset:
    """A dataset of the hub as the user names it: `owner/name`, `owner/name:config`, `owner/name@revision`, or all."""

    shown: str
    name: str
    config: str | None
    revision: str | None

    @property
    def folder(self) -> Path:
        """Its directory in the cache, with one directory for each commit."""
        folder = self.name.replace("/", "__")
        # No name of the hub holds two dashes in a row.
        folder += "" if self.config is None else f"--{quote(self.config, safe='')}"
        return cache_directory() / "datasets" / folder

    @property
    def ref(self) -> Path:
        """The file that holds the commit of the revision."""
        return self.folder / _REFS / quote(self.revision or "main", safe="")

    def commit(self) -> str:
        """The commit that the hub has for the revision."""
        import huggingface_hub

        revision = {} if self.revision is None else {"revision": self.revision}
        return str(huggingface_hub.HfApi().dataset_info(self.name, timeout=_TIMEOUT_SECONDS, **revision).sha)

    def cached_commit(self) -> str | None:
        """The commit that was downloaded last for the revision."""
        if self.ref.is_file():
            return self.ref.read_text(encoding="utf-8").strip()
        if self.revision is not None:
            is_commit = _COMMIT.fullmatch(self.revision) is not None and (self.folder / self.revision).is_dir()
            return self.revision if is_commit else None
        cached = sorted(self.folder.glob("*/[!.]*.jsonl"), key=lambda path: path.stat().st_mtime)
        return cached[-1].parent.name if cached else None

    def download(self, commit: str) -> Mapping[str, Any]:
        """Every split, by name."""
        import datasets

        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(self.name, self.config, revision=commit)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            fix = f"name its configuration, as in {self.name}:CONFIG" if "onfig" in reason else ""
            raise DataError(
                f"cannot be downloaded: {reason[:400]}", where=f"--dataset {self.shown}", fix=fix
            ) from error


def fetch_splits(dataset: str, near: str) -> tuple[list[str], Locate]:
    """Find the splits of a hub dataset.

    Args:
        dataset: `owner/name`, perhaps with `:config` and `@revision`.
        near: suggestion for a path that looks mistyped, or nothing.

    Returns:
        The names of the splits, and a function that returns the JSONL file of one and downloads it if need be.

    Raises:
        UsageError: it is not a hub id, or the hub does not have it or cannot be reached.
        DataError: it cannot be downloaded.
    """
    where = f"--dataset {dataset}"
    match = _HUB_ID.fullmatch(dataset)
    if near or match is None or Path(dataset.split("/")[0]).is_dir():
        raise UsageError(f"no such file or directory{near}", where=where)
    found = _HubDataset(dataset, match["name"], match["config"], match["revision"])
    try:
        commit = found.commit()
    except Exception as error:
        cached = found.cached_commit()
        if cached is not None:
            return _cached_splits(found, cached)
        reason = f"hub: {type(error).__name__}"
        raise UsageError(
            f"no such file or directory, and no dataset to download by this name ({reason})", where=where
        ) from error
    return _splits_of_commit(found, commit)


def _cached_splits(dataset: _HubDataset, commit: str) -> tuple[list[str], Locate]:
    """The splits in the cache, while the hub cannot be reached."""
    folder = dataset.folder / commit
    cached = sorted(file.stem for file in folder.glob("[!.]*.jsonl"))

    def locate(split: str) -> Path:
        if split not in cached:
            what = f"split {split!r} is not cached, and the hub cannot be reached"
            raise UsageError(what, where=f"--dataset {dataset.shown}")
        return folder / f"{split}.jsonl"

    return _recorded_names(folder) or cached, locate


def _splits_of_commit(dataset: _HubDataset, commit: str) -> tuple[list[str], Locate]:
    folder = dataset.folder / commit
    loaded: dict[str, Mapping[str, Any]] = {}

    def load() -> Mapping[str, Any]:
        if commit not in loaded:
            loaded[commit] = dataset.download(commit)
        return loaded[commit]

    def locate(split: str) -> Path:
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            _write((json.dumps(row, ensure_ascii=False, default=str) for row in load()[split]), file)
        return file

    names = _recorded_names(folder)
    if names is None:
        names = list(load())
        _write([json.dumps({"splits": names})], folder / _SPLITS_FILE)
    if dataset.cached_commit() != commit or not dataset.ref.is_file():
        _write([commit], dataset.ref)
    return names, locate


def _recorded_names(folder: Path) -> list[str] | None:
    try:
        return list(json.loads((folder / _SPLITS_FILE).read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(lines: Iterable[str], path: Path) -> None:
    """Write a file of the cache. Several processes may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, f"{os.getpid()}-") as partial, partial.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)
