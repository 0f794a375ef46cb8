"""Standard streams that fail: no work is lost, nothing is said that is not true, nothing raw reaches a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

import pytest
from conftest import Done, read_jsonl, run_here, write_jsonl

from tisdpo_cli.cli.app import main
from tisdpo_cli.cli.streams import prepare_streams, write_path
from tisdpo_cli.model.tokenizer import load_tokenizer

SHORT = ("--max-steps", "3", "--batch-size", "4", "--eval-pairs", "0", "--warmup-steps", "0")


def train_dpo(world: Path, out: Path) -> list[str | Path]:
    return ["train-dpo", "-m", world / "sft", "-d", world / "data", "-o", out, *SHORT]


def run_with(*arguments: str | Path, out: IO[str], err: IO[str]) -> int:
    """Run the program in this process on these streams; its exit code."""
    argv, sys.argv = sys.argv, ["tisdpo", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
            main()
    finally:
        sys.argv = argv
    return int(left.value.code or 0)


# ---------------------------------------------------------------- stderr goes away


class GoesAway(io.StringIO):
    """A stream whose reader ends after some writes."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@contextmanager
def failing(kind: str) -> Iterator[IO[str]]:
    if kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        stream: IO[str] = os.fdopen(writer, "w", buffering=1)
    elif kind == "full":
        stream = open("/dev/full", "w", buffering=1)  # noqa: PTH123, SIM115
    elif kind == "closed":
        stream = io.StringIO()
        stream.close()
    else:
        stream = GoesAway(int(kind))
    yield stream
    try:
        stream.close()
    except OSError:
        return


@pytest.mark.parametrize("kind", ["pipe", "full", "closed", "1", "4"])
def test_a_training_survives_its_stderr(world: Path, tmp_path: Path, kind: str) -> None:
    out = io.StringIO()
    with failing(kind) as err:
        code = run_with(*train_dpo(world, tmp_path / "out"), out=out, err=err)
    assert (code, out.getvalue()) == (0, f"{tmp_path / 'out'}\n")
    assert [row["step"] for row in read_jsonl(tmp_path / "out" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert (tmp_path / "out" / "run.json").is_file()


def test_an_error_keeps_its_exit_code_without_stderr() -> None:
    with failing("pipe") as err:
        assert run_with("train-dpo", "--bata", "3", out=io.StringIO(), err=err) == 2


def test_a_slow_reader_is_still_one() -> None:
    class Slow(io.StringIO):
        calls = 0

        def write(self, text: str) -> int:
            self.calls += 1
            if self.calls == 1:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            return super().write(text)

    err = Slow()
    run_with("train-dpo", "--beta", "0", "--batch-size", "1.5", out=io.StringIO(), err=err)
    assert "error: " in err.getvalue()


def test_a_closed_stderr_does_not_end_in_stdout_or_in_a_file() -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "tisdpo_cli", "train-dpo", "--bata", "3"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (2, b"")


# ---------------------------------------------------------------- what stdout cannot encode

WIDE = " 你好 café"


@pytest.fixture(scope="module")
def scored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "scored"
    tokenizer = load_tokenizer(world / "sft")
    row = {"prompt": "p", "chosen": WIDE, "rejected": " no"}
    for side in ("chosen", "rejected"):
        row[f"{side}_weight"] = [0.1 * t for t in range(len(tokenizer.texts.encode([row[side]])[0]))]  # type: ignore[assignment]
    write_jsonl(path / "train.jsonl", [row])
    tokenizer.backend.save_pretrained(path)
    return path


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_stdout_cannot_encode_is_escaped(scored: Path, encoding: str) -> None:
    raw, err = io.BytesIO(), io.StringIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    code = run_with("inspect-weights", scored, out=stream, err=err)
    shown = raw.getvalue().decode(encoding)
    assert (code, "stdout" in err.getvalue()) == (0, False), err.getvalue()
    assert ("你" if encoding == "utf-8" else "\\u4f60") in shown
    assert "chosen" in shown


def test_an_error_handler_of_the_user_stays(scored: Path) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="replace")
    assert run_with("inspect-weights", scored, out=stream, err=io.StringIO()) == 0
    assert b"\\u4f60" not in raw.getvalue()


def test_bytes_of_a_path_that_are_no_text_come_out_as_they_are() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8")
    with redirect_stdout(stream), redirect_stderr(io.StringIO()):
        prepare_streams()
        write_path(Path(os.fsdecode(b"/tmp/caf\xe9")))
    assert raw.getvalue() == b"/tmp/caf\xe9\n"


# ---------------------------------------------------------------- terminals


def test_no_columns_print_as_eighty(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    usual = [run_here("inspect-weights", scored), run_here("train", "--help")]
    for columns in ("0", "00", ""):
        monkeypatch.setenv("COLUMNS", columns)
        assert [run_here("inspect-weights", scored), run_here("train", "--help")] == usual
    assert len(usual[0].out) > 500


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_path_with_control_characters_is_escaped_on_a_terminal(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "\x1b]0;title\x07\u202e"
    shown, err = Terminal(), io.StringIO()
    assert run_with(*train_dpo(world, out), out=shown, err=err) == 0
    assert shown.getvalue() == f"{tmp_path}/\\x1b]0;title\\x07\\u202e\n"
    # A program that reads stdout gets the path itself.
    again = run_here(*train_dpo(world, out))
    assert again == Done(0, f"{out}\n", again.err)
    assert not set("\x1b\x07\u202e") & set(err.getvalue() + again.err)
    as_json = run_here(*train_dpo(world, out), "--json")
    assert json.loads(as_json.out)["path"] == str(out)
    assert not set("\x1b\x07\u202e") & set(as_json.out)
