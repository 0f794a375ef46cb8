"""Output directories that are not what they seem: foreign markers, planted links, links that lead nowhere."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, largest_file, run_here

from tisdpo_cli.errors import TrainingError, UsageError
from tisdpo_cli.files import write_json, write_text
from tisdpo_cli.runs.outputs import Output, claim

SHORT = ("--max-steps", "1", "--batch-size", "4", "--eval-pairs", "0", "--warmup-steps", "0")


def train_dpo(world: Path, out: Path, *more: str) -> Done:
    return run_here("train-dpo", "-m", world / "sft", "-d", world / "data", "-o", out, *SHORT, *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ---------------------------------------------------------------- whose marker is it?

FOREIGN: dict[str, tuple[str, Any]] = {
    "of another tool": ("run.json", {"name": "sweep-3", "status": "done"}),
    "a list": ("run.json", []),
    "empty": ("run.json", None),
    "with a command": ("run.json", {"command": "python train.py", "files": ["notes.txt"]}),
    "with versions": ("run.json", {"command": "x", "made_from": {}, "versions": {"torch": "2"}, "files": []}),
    "with files that are no list": (
        "run.json",
        {"command": "x", "made_from": {}, "versions": {"tisdpo": "1"}, "files": "notes.txt"},
    ),
    "started by another tool": (".started.json", {"pid": 3}),
    "started, no text": (".started.json", None),
}


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(("name", "marker"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_marker_that_tisdpo_did_not_write_is_none(tmp_path: Path, name: str, marker: Any, overwrite: bool) -> None:
    out = tmp_path / "mine"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "epoch-3.pt").write_text("days of work")
    for precious in ("notes.txt", "config.yaml", "metrics.jsonl"):
        (out / precious).write_text("mine")
    (out / name).write_text("\x00" if marker is None else json.dumps(marker))
    before = contents(out)
    with pytest.raises(UsageError, match="not written by tisdpo"):
        claim(out, "train-dpo", {"seed": 0}, overwrite=overwrite)
    assert contents(out) == before


def test_overwrite_of_a_foreign_marker_removes_nothing(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text('{"name": "sweep-3", "files": ["model.safetensors"]}')
    (out / "model.safetensors").write_text("days of work")
    before = contents(out)
    done = train_dpo(world, out, "--overwrite")
    assert (done.code, done.out) == (2, "")
    assert "run.json" in done.error
    assert contents(out) == before


# ---------------------------------------------------------------- planted links


def planted(out: Path, name: str, target: Path) -> None:
    out.mkdir(exist_ok=True)
    (out / name).symlink_to(target)


@pytest.mark.parametrize(
    "name", [".partial-run.json", ".partial-.started.json", ".partial-config.yaml", ".partial-metrics.jsonl"]
)
def test_a_link_named_like_a_temporary_file_is_not_followed(world: Path, tmp_path: Path, name: str) -> None:
    mine = tmp_path / "thesis.tex"
    mine.write_text("years of work")
    planted(tmp_path / "out", name, mine)
    done = train_dpo(world, tmp_path / "out")
    assert done.code == 0, done.err
    assert mine.read_text() == "years of work"
    assert not (tmp_path / "out" / "run.json").is_symlink()
    assert not list((tmp_path / "out").glob(".partial-*"))


def test_a_link_named_like_the_staging_directory_is_not_followed(world: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("mine")
    planted(tmp_path / "out", ".partial-output", mine)
    assert train_dpo(world, tmp_path / "out").code == 0
    assert contents(mine) == {"config.json": b"mine"}


@pytest.mark.parametrize(
    "name", ["checkpoints", ".parts", ".started.json", "run.json", "metrics.jsonl", "config.yaml", ".lock"]
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_link_in_the_place_of_a_file_of_ours_is_refused(tmp_path: Path, name: str, overwrite: bool) -> None:
    mine = tmp_path / "mine"
    marker = {"command": "train", "made_from": {}, "versions": {"tisdpo": "0.1.0"}, "files": ["a"]}
    if name in ("checkpoints", ".parts"):
        mine.mkdir()
        (mine / "a").write_text("mine")
    else:
        mine.write_text(json.dumps(marker))
    planted(tmp_path / "out", name, mine)
    with pytest.raises(UsageError, match=f"symbolic link, {name}"):
        claim(tmp_path / "out", "train-dpo", {}, overwrite=overwrite)
    assert contents(tmp_path / "mine" if mine.is_dir() else tmp_path)
    assert mine.is_dir() or json.loads(mine.read_text()) == marker


@pytest.mark.parametrize("write", [write_text, lambda path, _: write_json(path, {})], ids=["text", "JSON"])
def test_a_written_file_replaces_links_and_has_the_permissions_of_the_umask(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("report.html", ".partial-report.html"):
        (tmp_path / name).symlink_to(mine)
    mask = os.umask(0o027)
    try:
        write(tmp_path / "report.html", "new")
    finally:
        os.umask(mask)
    assert mine.read_text() == "mine"
    path = tmp_path / "report.html"
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert not list(tmp_path.glob(".partial-*"))


# ---------------------------------------------------------------- links that lead nowhere


@pytest.mark.parametrize("inside", ["", "runs/1"], ids=["itself", "above"])
@pytest.mark.parametrize("target", ["nowhere", "loop"])
def test_a_dangling_link_is_named(world: Path, tmp_path: Path, target: str, inside: str) -> None:
    link = tmp_path / "loop"
    link.symlink_to(tmp_path / target)
    done = train_dpo(world, link / inside)
    assert (done.code, done.out) == (2, ""), done.err
    assert f"is a dangling symbolic link to {tmp_path / target}" in done.error
    assert "File exists" not in done.error
    assert names(tmp_path) == ["loop"]


def test_a_link_to_a_directory_is_as_good_as_it(world: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert train_dpo(world, tmp_path / "out").code == 0
    assert (tmp_path / "disk" / "run.json").is_file()


# ---------------------------------------------------------------- temporary files


def partials(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".partial-*")]


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(TrainingError, match="cannot be written"):
        write_text(tmp_path / "report.html", "x" * 2000)
    assert names(tmp_path) == []


def test_a_failed_run_leaves_no_temporary_file(world: Path, tmp_path: Path) -> None:
    with largest_file(20_000):
        done = train_dpo(world, tmp_path / "out")
    assert done.code == 1, done.err
    assert "cannot be written" in done.error
    assert partials(tmp_path) == []


def started(out: Path) -> Output:
    output = claim(out, "estimate", {"seed": 0}, overwrite=False)
    output.start("seed: 0\n")
    return output


def test_what_a_killed_run_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    started(tmp_path / "out").release()
    parts = tmp_path / "out" / ".parts"
    parts.mkdir()
    (parts / "train-000000-forward.safetensors").write_text("done")
    for folder in (tmp_path / "out", parts):
        (folder / ".partial-x.safetensors").write_text("half")
    (tmp_path / "out" / ".partial-output").mkdir()
    (tmp_path / "out" / ".partial-output" / "config.json").write_text("{}")
    with started(tmp_path / "out") as output:
        assert output.state == "started"
        assert partials(tmp_path) == []
    assert (parts / "train-000000-forward.safetensors").read_text() == "done"


def test_a_directory_that_was_refused_keeps_its_temporary_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".partial-thesis.tex").write_text("mine too")
    with pytest.raises(UsageError):
        claim(tmp_path, "train-dpo", {}, overwrite=True)
    assert names(tmp_path) == [".partial-thesis.tex", "notes.txt"]


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_outputs_have_the_permissions_of_the_umask(world: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        assert train_dpo(world, tmp_path / "out", "--save-every", "1", "--cache-dir", str(tmp_path / "cache")).code == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert {"run.json", "model.safetensors", "checkpoint.json"} <= {path.name for path in files}
    rows = tmp_path / "cache" / "rows"
    assert {str(path): stat.S_IMODE(path.stat().st_mode) for path in files} == {
        # Texts of a dataset are its owner's.
        str(path): (0o600 if rows in path.parents else 0o666) & ~mask
        for path in files
    }
