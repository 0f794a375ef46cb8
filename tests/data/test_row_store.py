"""Files of rows by what they depend on: whole or absent, verified, built once, and never a reason to stop."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pytest
from conftest import largest_file

from tisdpo_cli.cached_files import row_files
from tisdpo_cli.cli.process import leave
from tisdpo_cli.data import row_store
from tisdpo_cli.data.arrow_files import ArrowFile, ArrowWriter, in_memory, list_array, open_arrow
from tisdpo_cli.data.row_store import RowStore
from tisdpo_cli.errors import DataError

SCHEMA = pa.schema([("text", pa.string()), ("number", pa.int64()), ("ids", pa.list_(pa.int32()))])
IDS = [[], [5], [1, 2, 3], [], [2**31 - 1, 0]]
KEY = {"content": "x"}


class Builder:
    """Writes five rows in two batches, and counts how often."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls, self.seconds = 0, seconds

    def __call__(self, stream: BinaryIO) -> None:
        self.calls += 1
        time.sleep(self.seconds)
        writer = ArrowWriter(stream, SCHEMA)
        for begin, end in ((0, 3), (3, 5)):
            rows = range(begin, end)
            texts = pa.array([f"row {i}" for i in rows])
            writer.write(pa.record_batch([texts, pa.array(list(rows)), list_array(IDS[begin:end])], schema=SCHEMA))
        writer.finish({"notices": ["é"], "rows": 5})


def whole(file: ArrowFile) -> bool:
    return (
        len(file) == 5
        and file.about == {"notices": ["é"], "rows": 5}
        and file.values("text", 1, 5) == [f"row {i}" for i in range(1, 5)]
        and [file.value("number", i) for i in range(5)] == list(range(5))
        and [file.ids("ids", i) for i in range(5)] == IDS
        and file.numbers("ids").tolist() == [0, 1, 3, 0, 2]
        and file.numbers("number").tolist() == list(range(5))
    )


@pytest.fixture
def warned() -> list[str]:
    return []


def path_in(directory: Path) -> Path:
    (path,) = directory.rglob("*.arrow")
    return path


def test_a_file_is_built_once_and_read_from_then_on(tmp_path: Path, warned: list[str]) -> None:
    build = Builder()
    assert whole(RowStore(tmp_path, warned.append).file(KEY, build))
    store = RowStore(tmp_path, warned.append)
    assert whole(store.file(KEY, build))
    assert store.file(KEY, build) is store.file(dict(KEY), build)
    assert build.calls == 1
    assert whole(store.file({"content": "y"}, build))
    assert build.calls == 2
    assert warned == []
    assert sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file()) == [".arrow", ".arrow"]
    assert row_files(tmp_path).size()[0] == 2


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    import datasets

    RowStore(tmp_path).file(KEY, Builder())
    rows = datasets.Dataset.from_file(str(path_in(tmp_path)))
    assert rows["ids"][:] == IDS
    assert rows.column_names == ["text", "number", "ids"]


def test_a_file_is_sent_to_another_process_by_its_path(tmp_path: Path) -> None:
    file = RowStore(tmp_path).file(KEY, Builder())
    assert whole(pickle.loads(pickle.dumps(file)))
    content = path_in(tmp_path).read_bytes()
    assert whole(in_memory(content))
    with pytest.raises(TypeError):
        pickle.dumps(in_memory(content))


def test_without_a_key_a_file_lasts_as_long_as_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    build, store = Builder(), RowStore(tmp_path / "cache")
    assert whole(store.file(None, build))
    assert whole(store.file(None, build))
    assert build.calls == 2
    assert not (tmp_path / "cache").exists()
    del store
    assert list((tmp_path / "temporary").iterdir()) == []


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "a few bytes": lambda content: content[:10],
    "cut": lambda content: content[:-1],
    "cut in half": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
    "flipped in the rows": lambda content: content.replace(b"row 1", b"row 7"),
    "flipped in the record": lambda content: content.replace(b"notices", b"notizes"),
    "flipped in the hash": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_noticed_and_the_file_built_anew(
    tmp_path: Path, warned: list[str], damage: Callable[[bytes], bytes]
) -> None:
    build = Builder()
    RowStore(tmp_path).file(KEY, build)
    path = path_in(tmp_path)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert open_arrow(path) is None
    assert whole(RowStore(tmp_path, warned.append).file(KEY, build))
    assert build.calls == 2
    assert warned == [f"{path} is damaged; reading the dataset again"]
    assert path.read_bytes() == content


@pytest.mark.parametrize("how", ["raises", "is killed"])
def test_what_ends_while_it_is_built_is_not_taken_for_whole(tmp_path: Path, how: str) -> None:
    def half(stream: BinaryIO) -> None:
        writer = ArrowWriter(stream, SCHEMA)
        writer.write(pa.record_batch([pa.array(["a"]), pa.array([1]), list_array([[1]])], schema=SCHEMA))
        raise KeyboardInterrupt

    if how == "raises":
        with pytest.raises(KeyboardInterrupt):
            RowStore(tmp_path).file(KEY, half)
    else:
        program = (
            "import os, signal, sys\nfrom pathlib import Path\n"
            "from tisdpo_cli.data.row_store import RowStore\n"
            "def build(stream):\n    stream.write(b'half'); stream.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
            f"RowStore(Path({str(tmp_path)!r})).file({KEY!r}, build)"
        )
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode < 0
        assert list(tmp_path.rglob(".partial-*.arrow"))
    assert not [path for path in tmp_path.rglob("*.arrow") if not path.name.startswith(".partial-")]
    assert row_files(tmp_path).size() == (0, 0)
    build = Builder()
    assert whole(RowStore(tmp_path).file(KEY, build))
    assert build.calls == 1


def test_two_that_start_together_build_once(tmp_path: Path, warned: list[str]) -> None:
    build = Builder(seconds=0.2)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(whole(RowStore(tmp_path, warned.append).file(KEY, build))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3
    assert build.calls == 1
    assert warned == []


def test_the_first_process_of_a_machine_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one, which is earlier, waits for it; but not for ever."""
    first, other, waits = Builder(), Builder(), threading.Event()
    monkeypatch.setattr(row_store.time, "sleep", lambda _seconds: waits.set())
    monkeypatch.setenv("LOCAL_RANK", "1")
    thread = threading.Thread(target=RowStore(tmp_path).file, args=(KEY, other))
    thread.start()
    assert waits.wait(10)
    monkeypatch.setenv("LOCAL_RANK", "0")
    RowStore(tmp_path).file(KEY, first)
    thread.join()
    assert (first.calls, other.calls) == (1, 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(row_store, "_GRACE", 0.0)
    RowStore(tmp_path).file({"content": "z"}, other)
    assert other.calls == 1


def test_where_the_cache_cannot_be_written_a_temporary_file_does(tmp_path: Path, warned: list[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    build = Builder()
    file = RowStore(tmp_path / "file", warned.append).file(KEY, build)
    assert whole(file)
    assert file.path is not None
    (warning,) = warned
    assert warning.startswith(str(tmp_path / "file"))
    assert "cannot be written" in warning


def test_where_nothing_can_be_written_memory_does(
    tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RowStore(tmp_path, warned.append)
    with largest_file(200):
        file = store.file(KEY, Builder())
    assert whole(file)
    assert file.path is None
    assert len(warned) == 1
    assert row_files(tmp_path).size() == (0, 0)


def test_files_used_least_recently_make_room(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    for age in range(4):
        store.file({"age": age}, Builder())
    size = row_files(tmp_path).size()[1] // 4
    for path in tmp_path.rglob("*.arrow"):
        os.utime(path, (1000, 1000))
    bounded = RowStore(tmp_path, bound=int(4.5 * size))
    used = bounded.file({"age": 2}, Builder())
    last = bounded.file({"age": 9}, Builder())
    left = set(tmp_path.rglob("*.arrow"))
    assert len(left) == 4
    assert {used.path, last.path} <= left
    # What is open stays readable.
    assert whole(store.file({"age": 0}, Builder()))


def test_memory_is_handed_back_and_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tisdpo_cli.data.arrow_files._ROWS_KEPT", 2)
    file = RowStore(tmp_path).file(KEY, Builder())
    assert whole(file)
    assert whole(file)
    assert np.array_equal(file.numbers("number"), np.arange(5))


def test_an_error_of_the_build_is_not_one_of_the_cache(tmp_path: Path, warned: list[str]) -> None:
    calls: list[BinaryIO] = []

    def broken(stream: BinaryIO) -> None:
        calls.append(stream)
        stream.write(b"half")
        raise PermissionError(13, "not the cache")

    for key in (KEY, None):
        with pytest.raises(PermissionError, match="not the cache"):
            RowStore(tmp_path, warned.append).file(key, broken)
    assert len(calls) == 2
    assert warned == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_only_their_owner_reads_rows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        RowStore(tmp_path).file(KEY, Builder())
    finally:
        os.umask(before)
    path = path_in(tmp_path)
    assert [entry.stat().st_mode & 0o777 for entry in (path.parents[1], path.parent, path)] == [0o700, 0o700, 0o600]


def test_a_dataset_larger_than_the_bound_is_kept_and_said(tmp_path: Path, warned: list[str]) -> None:
    builds = [Builder(), Builder(), Builder()]
    RowStore(tmp_path).file({"another": 1}, Builder())
    for path in tmp_path.rglob("*.arrow"):
        os.utime(path, (1000, 1000))
    for _ in range(3):
        store = RowStore(tmp_path, warned.append, bound=1000)
        for number, build in enumerate(builds):
            assert whole(store.file({"part": number}, build))
    assert [build.calls for build in builds] == [1, 1, 1]
    assert row_files(tmp_path).size()[0] == 3
    (warning,) = warned
    assert "more than" in warning


def test_waiting_for_another_run_is_said(tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "_QUIET", 0.0)
    begun, go, noted = threading.Event(), threading.Event(), threading.Event()
    notes: list[str] = []

    def slow(stream: BinaryIO) -> None:
        begun.set()
        assert go.wait(60)
        Builder()(stream)

    def note(text: str) -> None:
        notes.append(text)
        noted.set()

    first = threading.Thread(target=RowStore(tmp_path, warned.append, note=notes.append).file, args=(KEY, slow))
    other = threading.Thread(target=RowStore(tmp_path, warned.append, note=note).file, args=(KEY, Builder()))
    first.start()
    assert begun.wait(60)
    other.start()
    assert noted.wait(60)
    go.set()
    first.join()
    other.join()
    assert notes == ["waiting for another run that reads this dataset"]
    assert warned == []


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = RowStore(tmp_path).file(KEY, Builder()).path
    assert path is not None
    path.unlink()
    left, others = path.with_name(f".partial-0a-{path.name}"), path.with_name(".partial-0a-other.arrow")
    left.touch()
    others.touch()
    RowStore(tmp_path).file(KEY, Builder())
    assert not left.exists()
    assert others.exists(), "another process may write it"


@pytest.mark.parametrize("how", ["raises", "leaves"])
def test_no_temporary_file_outlives_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def half(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    store = RowStore(tmp_path)
    if how == "raises":
        with pytest.raises(KeyboardInterrupt):
            store.file(None, half)
    else:
        store.file(None, Builder())
        assert list(tmp_path.iterdir()) != []
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        with pytest.raises(SystemExit):
            leave(1)
    assert list(tmp_path.iterdir()) == []


def test_who_waits_meets_the_fault_of_the_first_without_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(row_store, "_QUIET", 0.0)
    begun, waiting = threading.Event(), threading.Event()
    read: list[str] = []
    met: list[DataError] = []

    def run(name: str, note: Callable[[str], object]) -> None:
        def build(_stream: BinaryIO) -> None:
            read.append(name)
            begun.set()
            assert waiting.wait(60)
            raise DataError("is null", where="é:3", fix="fill it", details=("one", "two"))

        with pytest.raises(DataError) as caught:
            RowStore(tmp_path, note=note).file(KEY, build)
        met.append(caught.value)

    first = threading.Thread(target=run, args=("first", read.append))
    other = threading.Thread(target=run, args=("other", lambda _text: waiting.set()))
    first.start()
    assert begun.wait(60)
    other.start()
    first.join()
    other.join()
    assert read == ["first"]
    told = [(fault.what, fault.where, fault.fix, fault.details) for fault in met]
    assert told == [("is null", "é:3", "fill it", ("one", "two"))] * 2
    # The next run reads it anew.
    assert whole(RowStore(tmp_path).file(KEY, Builder()))
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".arrow"]
