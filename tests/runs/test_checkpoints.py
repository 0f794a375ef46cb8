"""Checkpoints by themselves: whole or absent, verified before use, older ones removed, nothing pickled."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import largest_file
from safetensors import SafetensorError

from tisdpo_cli.errors import TrainingError, UsageError
from tisdpo_cli.runs.checkpoints import Checkpoint, newest_checkpoint, open_checkpoint, save_checkpoint
from tisdpo_cli.runs.saved_tensors import saved_tensors

MODEL, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "checkpoint.json"


def save(directory: Path, *steps: int, keep: int = 9) -> Path:
    """Checkpoints of these steps, each with its own numbers in it; the path of the last."""
    for step in steps:
        tensors = {
            "model": {"weight": torch.full((50, 4), float(step)), "bias": torch.arange(4.0) + step},
            "optimizer": {"0.step": torch.tensor(float(step)), "0.square_avg": torch.full((50, 4), 0.1 * step)},
        }
        path = save_checkpoint(directory, step, tensors, {"made_from": {"seed": 7}}, keep)
    return path


def contents(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a group."""
    with saved_tensors(checkpoint, name) as saved:
        return {key: saved.read(key) for key in saved.names}


def newest(directory: Path) -> tuple[int | None, list[str]]:
    """The step of the newest usable checkpoint, and the warnings."""
    warnings: list[str] = []
    found = newest_checkpoint(directory, warnings.append)
    return (None if found is None else found.step), warnings


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def steps_in(directory: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(directory)]


# ---------------------------------------------------------------- saved and opened


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved = {
        "floats": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        "special": torch.tensor([float("inf"), float("-inf"), -0.0, 1e-45]),
        "half": torch.randn(7).to(torch.bfloat16),
        "step": torch.tensor(12),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "empty": torch.zeros(0, 4),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    state = {"made_from": {"optim.learning_rate": 5e-7, "content of data": "abc"}, "list": [1, None, "ä"]}
    path = save_checkpoint(tmp_path / "checkpoints", 12, {"model": saved, "none": {}}, state, keep=1)
    opened = open_checkpoint(path)
    assert (opened.step, opened.state) == (12, state)
    assert contents(opened, "none") == {}
    back = contents(opened, "model")
    assert back.keys() == saved.keys()
    for name, tensor in saved.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor.detach())
    assert back["special"].signbit().tolist() == [False, True, True, False]


def test_the_newest_is_found_among_many(tmp_path: Path) -> None:
    save(tmp_path, 2, 30, 1000)
    assert newest(tmp_path) == (1000, [])
    assert newest(tmp_path / "nowhere") == (None, [])


def test_a_step_saved_again_replaces_itself(tmp_path: Path) -> None:
    save(tmp_path, 4)
    path = save_checkpoint(tmp_path, 4, {"model": {"weight": torch.zeros(1)}}, {}, keep=2)
    assert names(path) == [MANIFEST, MODEL]
    assert steps_in(tmp_path) == [4]
    assert contents(open_checkpoint(path), "model")["weight"].item() == 0


def test_the_same_state_makes_the_same_bytes(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    for name in names(a):
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_are_kept_as_asked_for(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=keep)
    assert steps_in(tmp_path) == [1, 2, 3, 4][-keep:]


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for module, name in ((pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    path = save(tmp_path, 5)
    contents(open_checkpoint(path), "model")
    assert names(path) == [MANIFEST, MODEL, OPTIMIZER]
    json.loads((path / MANIFEST).read_text())
    for name in (MODEL, OPTIMIZER):
        content = (path / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert json.loads(content[8 : 8 + length])


# ---------------------------------------------------------------- damaged


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def swap_files(folder: Path) -> None:
    (folder / MODEL).rename(folder / "x")
    (folder / OPTIMIZER).rename(folder / MODEL)
    (folder / "x").rename(folder / OPTIMIZER)


def manifest(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / MANIFEST).write_text(text) and None


def edit_manifest(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**content, **changes}))

    return edit


def without_hash(path: Path) -> None:
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty folder": lambda folder: [entry.unlink() for entry in folder.iterdir()],
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": manifest(""),
    "manifest truncated": lambda folder: truncate(folder / MANIFEST),
    "manifest not UTF-8": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe{\0}\0"),
    "manifest garbage": manifest("\0\0\0"),
    "manifest a list": manifest("[]"),
    "manifest a number": manifest("8"),
    "manifest nested too deeply": manifest("[" * 100_000),
    "manifest of an earlier version": lambda folder: without_hash(folder / MANIFEST),
    "manifest with another step": edit_manifest(step=7),
    "manifest with an absurd step": edit_manifest(step=10**6),
    "manifest with a negative step": edit_manifest(step=-6),
    "manifest with another state": edit_manifest(state={"made_from": {"seed": 8}}),
    "manifest with another hash": edit_manifest(sha256="0" * 64),
    "manifest with one more key": edit_manifest(more=1),
    "manifest written another way": lambda folder: (folder / MANIFEST).write_text(
        json.dumps(json.loads((folder / MANIFEST).read_text()), indent=1)
    ),
    "manifest that lists a file elsewhere": edit_manifest(files={f"../step-00000004/{MODEL}": {}}),
    "manifest of another step": lambda folder: shutil.copy(folder.parent / "step-00000004" / MANIFEST, folder),
    "manifest without its step": manifest('{"files": {}, "state": {}}'),
    "manifest with an endless step": edit_manifest(step=float("inf")),
    "manifest that lists no file": edit_manifest(files={}),
    "manifest that lists nonsense": edit_manifest(files={MODEL: 3}),
    "no model": lambda folder: (folder / MODEL).unlink(),
    "model empty": lambda folder: (folder / MODEL).write_bytes(b""),
    "model truncated": lambda folder: truncate(folder / MODEL),
    "model with a flipped bit": lambda folder: flip_a_byte(folder / MODEL),
    "model longer": lambda folder: (folder / MODEL).open("ab").write(b"\0"),
    "model of another step": lambda folder: shutil.copy(folder.parent / "step-00000004" / MODEL, folder),
    "no optimizer": lambda folder: (folder / OPTIMIZER).unlink(),
    "optimizer empty": lambda folder: (folder / OPTIMIZER).write_bytes(b""),
    "optimizer truncated": lambda folder: truncate(folder / OPTIMIZER),
    "optimizer with a flipped bit": lambda folder: flip_a_byte(folder / OPTIMIZER),
    "files swapped": swap_files,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    broken = save(tmp_path, 2, 4, 6)
    damage(broken)
    step, warnings = newest(tmp_path)
    assert step == 4
    assert len(warnings) == 1
    assert str(broken) in warnings[0]
    with pytest.raises(UsageError) as caught:
        open_checkpoint(broken)
    assert caught.value.where == str(broken)


def test_several_damaged_ones_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6)
    for step in (4, 6):
        (tmp_path / f"step-{step:08d}" / MODEL).unlink()
    step, warnings = newest(tmp_path)
    assert (step, len(warnings)) == (2, 2)
    (tmp_path / "step-00000002" / MANIFEST).unlink()
    step, warnings = newest(tmp_path)
    # Those of before have been renamed, not thrown away.
    assert (step, len(warnings)) == (None, 1)
    assert len(list(tmp_path.glob("damaged-*"))) == 3


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="checkpoint"):
            open_checkpoint(path)


def test_a_new_checkpoint_stays_though_damaged_ones_have_higher_steps(tmp_path: Path) -> None:
    """After falling back, progress is counted from the older step: the newest is what was written last."""
    for path in (save(tmp_path, 6), save(tmp_path, 8, keep=2)):
        truncate(path / MODEL)
    saved = save(tmp_path, 2, keep=2)
    assert saved.is_dir()
    assert newest(tmp_path)[0] == 2


def flipped(content: bytes, bit: int) -> bytes:
    """The same bytes with one bit turned over."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_one_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    """In the step, in the state, in names and hashes, in the tensors: every single bit."""
    tensors = {"model": {"w": torch.tensor([1.0])}, "optimizer": {"0.step": torch.tensor(2.0)}}
    path = save_checkpoint(tmp_path, 6, tensors, {"made_from": {"optim.learning_rate": 5e-7}}, keep=1)
    for name in (MANIFEST, MODEL, OPTIMIZER):
        content = (path / name).read_bytes()
        for bit in range(8 * len(content)):
            (path / name).write_bytes(flipped(content, bit))
            with pytest.raises(UsageError, match="damaged"):
                open_checkpoint(path)
        (path / name).write_bytes(content)
    assert open_checkpoint(path).step == 6


def test_the_name_of_the_directory_must_say_the_step(tmp_path: Path) -> None:
    save(tmp_path, 4, 6).rename(tmp_path / "step-00000007")
    step, (warning,) = newest(tmp_path)
    assert step == 4
    assert "it holds step 6" in warning
    # A copy under a name that says no step is as good as the original.
    copy = Path(shutil.copytree(tmp_path / "step-00000004", tmp_path / "keep"))
    assert open_checkpoint(copy).step == 4


def test_a_checkpoint_beyond_the_run_does_not_block_it(tmp_path: Path) -> None:
    save(tmp_path, 4, 10**6)
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warnings.append, last_step=8)
    assert found is not None
    assert found.step == 4
    assert "beyond the 8 steps of this run" in warnings[0]


def test_a_checkpoint_of_an_earlier_version_is_refused_as_such(tmp_path: Path) -> None:
    without_hash(save(tmp_path, 6) / MANIFEST)
    with pytest.raises(UsageError, match=r"damaged checkpoint: .*an earlier version"):
        open_checkpoint(tmp_path / "step-00000006")


# ---------------------------------------------------------------- half-written, and a full disk


def test_a_half_written_one_is_ignored_and_makes_way(tmp_path: Path) -> None:
    save(tmp_path, 2)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".partial-00000004")
    (tmp_path / "notes.txt").write_text("not ours")
    assert newest(tmp_path) == (2, [])
    save(tmp_path, 4)
    assert newest(tmp_path) == (4, [])
    assert names(tmp_path) == ["notes.txt", "step-00000002", "step-00000004"]


def no_room_for_tensors(*_: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL = {"tensors": ("safetensors.torch.save_file", no_room_for_tensors), "fsync": ("os.fsync", no_room)}


@pytest.mark.parametrize(("where", "fault"), FULL.values(), ids=FULL.keys())
def test_on_a_full_disk_earlier_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, fault: Callable[..., None]
) -> None:
    save(tmp_path, 2, 4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(where, fault)
        with pytest.raises(TrainingError, match=r"step 6 cannot be written.*No space left") as caught:
            save(tmp_path, 6, keep=1)
    assert caught.value.where == str(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    save(tmp_path, 6, keep=1)
    assert steps_in(tmp_path) == [6]


@pytest.mark.parametrize("stopped", [MODEL, OPTIMIZER, MANIFEST])
def test_where_files_cannot_grow_earlier_checkpoints_stay(tmp_path: Path, stopped: str) -> None:
    """The real limit, one byte too small for each file in turn."""
    big = {"model": {"w": torch.zeros(250)}, "optimizer": {"w": torch.zeros(500)}}
    state = {"made_from": "x" * 4000}
    whole = save_checkpoint(tmp_path, 2, big, state, keep=9)
    sizes = [(whole / name).stat().st_size for name in (MODEL, OPTIMIZER, MANIFEST)]
    assert sizes == sorted(sizes)
    limit = (whole / stopped).stat().st_size - 1
    with largest_file(limit), pytest.raises(TrainingError, match="step 4 cannot be written"):
        save_checkpoint(tmp_path, 4, big, state, keep=1)
    assert names(tmp_path) == ["step-00000002"]
    assert newest(tmp_path) == (2, [])


@pytest.mark.parametrize("name", [".partial-00000004", ".partial-00000009", "step-00000004"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    mine, folder = tmp_path / "mine", tmp_path / "checkpoints"
    mine.mkdir()
    (mine / MODEL).write_text("years of work")
    folder.mkdir()
    (folder / name).symlink_to(mine)
    path = save(folder, 4)
    assert (names(mine), (mine / MODEL).read_text()) == ([MODEL], "years of work")
    assert not path.is_symlink()
    assert names(folder) == ["step-00000004"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = save(tmp_path, 2)
    finally:
        os.umask(before)
    assert {entry.stat().st_mode & 0o777 for entry in path.iterdir()} == {0o666 & ~mask}


def test_where_no_directory_can_be_made_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        save(tmp_path / "file" / "checkpoints", 2)
