"""The terminal view through a real pseudo-terminal, at several widths."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from io import StringIO
from pathlib import Path

import pytest
from conftest import write_jsonl
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from tisdpo_cli.cli.console import TerminalReporter
from tisdpo_cli.model.tokenizer import load_tokenizer

WIDE = " 你好，世界。再见！ ok 👍🏽"
ARABIC = " مرحبا كيف حالك اليوم"


@pytest.fixture(scope="module")
def scored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with wide characters, and with text from right to left."""
    tokenizer = load_tokenizer(world / "sft")
    path = tmp_path_factory.mktemp("terminal") / "scored"
    rows = [
        {"prompt": "plain", "chosen": " I would gladly help you." * 6, "rejected": " Whatever, just guess." * 4},
        {"prompt": "wide", "chosen": WIDE * 3, "rejected": ARABIC * 2},
    ]
    for row in rows:
        for side in ("chosen", "rejected"):
            count = len(tokenizer.texts.encode([row[side]])[0])
            row[f"{side}_weight"] = [((t * 5) % 13 - 6) / 4 for t in range(count)]
    write_jsonl(path / "train.jsonl", rows)
    tokenizer.backend.save_pretrained(path)
    return path


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}


def in_a_pipe(columns: int, *arguments: str | Path, **env: str) -> str:
    """What the program writes to a pipe while its other streams are on a terminal of so many columns."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    done = subprocess.run(
        [sys.executable, "-m", "tisdpo_cli", *map(str, arguments)],
        stdin=inner, stdout=subprocess.PIPE, stderr=inner, env={**clean_environment(), **env}, timeout=60, check=False,
    )  # fmt: skip
    os.close(inner)
    os.close(outer)
    assert done.returncode == 0
    return done.stdout.decode("utf-8")


def on_a_terminal(columns: int, *arguments: str | Path, **env: str) -> tuple[int, str]:
    """Run the program with stdout on a pseudo-terminal of so many columns; its exit code and what it wrote."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "tisdpo_cli", *map(str, arguments)],
        stdin=inner, stdout=inner, stderr=subprocess.DEVNULL,
        env={**clean_environment(), "TERM": "xterm-256color", "COLORTERM": "truecolor", **env},
    )  # fmt: skip
    os.close(inner)
    written = b""
    while True:
        try:
            chunk = os.read(outer, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(outer)
    return child.wait(timeout=60), written.decode("utf-8").replace("\r\n", "\n")


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("index", [0, 1], ids=["latin", "wide and right to left"])
@pytest.mark.parametrize("columns", [60, 100, 200])
def test_every_line_fits_and_every_box_is_straight(scored: Path, columns: int, index: int) -> None:
    code, text = on_a_terminal(columns, "inspect-weights", scored, "--index", str(index))
    assert code == 0
    assert re.search(r"\x1b\[[0-9;]*48;2;", text), "colours"
    lines = without_colours(text).splitlines()
    assert max(map(cell_len, lines)) <= columns
    boxes = [line for line in lines if line.startswith(("╭", "│", "╰"))]
    assert {cell_len(line) for line in boxes} == {columns}
    assert any("chosen" in line and "rejected" in line for line in boxes) == (columns >= 100)
    body = "".join(line.strip("│ ") for line in boxes)
    assert "gladly" in body.replace("·", " ") if index == 0 else "⟨" in body


@pytest.mark.parametrize("columns", [80, 120])
def test_lists_break_between_their_items(scored: Path, columns: int) -> None:
    code, text = on_a_terminal(columns, "inspect-weights", scored, "--min-count", "1", "--compare", "rank_based")
    assert code == 0
    lines = without_colours(text).splitlines()
    assert max(map(cell_len, lines)) <= columns
    listed = [line for line in lines if "(×" in line or "(≥" in line or "(≤" in line or ", ×" in line]
    assert len(listed) > 6
    # Each item ends where its line ends, and no line begins inside one.
    assert all(line.endswith(")") for line in listed)
    assert not [line for line in listed if line.startswith(("(", "+", "-", "≥", "≤", "×"))]


def test_without_colours_each_token_has_its_value(scored: Path) -> None:
    code, text = on_a_terminal(100, "inspect-weights", scored, "--index", "0", "--show", "scores", NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", text)
    assert re.search(r"\{[+-]\d\.\d\d\}", without_colours(text))


def test_three_pairs_and_a_comparison(scored: Path) -> None:
    code, text = on_a_terminal(
        100, "inspect-weights", scored, "--limit", "2", "--sort", "index", "--compare", "rank_based", "--min-count", "1"
    )
    assert code == 0
    plain = without_colours(text)
    assert plain.index("pair 0 (") < plain.index("pair 1 (")
    assert "rank correlation" in plain
    assert plain.count("underlined: above neutral") == 1, "one legend"


def test_a_pipe_does_not_follow_the_terminal_beside_it(scored: Path) -> None:
    view = ("inspect-weights", scored, "--index", "0", "--min-count", "1")
    narrow, wide = (in_a_pipe(columns, *view) for columns in (60, 200))
    assert narrow == wide
    lines = narrow.splitlines()
    boxes = [line for line in lines if line.startswith(("╭", "│", "╰"))]
    assert {cell_len(line) for line in boxes} == {80}
    (listed,) = (line for line in lines if line.startswith("highest"))
    assert listed.count("(×") == 8, "one line, however long"
    asked = in_a_pipe(60, *view, COLUMNS="100")
    assert {cell_len(line) for line in asked.splitlines() if line.startswith("╭")} == {100}


def test_tables_on_stderr_are_whole_in_a_pipe() -> None:
    table, stream = Table("stage", "held-out accuracy"), StringIO()
    table.add_row("a stage with a name that is longer than forty columns", "79.2%")
    TerminalReporter(Console(file=stream, width=40)).show(table)
    assert "a stage with a name that is longer than forty columns" in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 5
